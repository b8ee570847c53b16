"""A locust user that streams completions and notes when every token arrives."""

import itertools
import json
import time
from collections import deque
from typing import Any, ClassVar

from geventhttpclient import HTTPClient
from locust import User, task
from locust.exception import StopUser

from benchmarks.load.measurements import LoadPlan, RequestSample

PATH = "/v1/completions"


class CompletionUser(User):
    """Sends the next prompt as soon as its last answer is complete, until no prompt is left (a closed loop)."""

    abstract = True
    plan: ClassVar[LoadPlan]
    prompts: ClassVar[deque[list[int]]]
    concurrency: ClassVar[int]
    output_tokens: ClassVar[int]

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.client = HTTPClient(
            "127.0.0.1", self.plan.port, connection_timeout=10.0, network_timeout=self.plan.timeout_s
        )

    def on_stop(self) -> None:
        self.client.close()

    @task
    def complete(self) -> None:
        if not self.prompts:
            raise StopUser
        sample = self._stream(self.prompts.popleft())
        self.environment.events.request.fire(
            request_type="POST",
            name=PATH,
            response_time=1000 * sample.end_to_end_s,
            response_length=sample.completion_tokens,
            exception=RuntimeError(sample.error) if sample.error else None,
            sample=sample,
        )

    def _stream(self, prompt: list[int]) -> RequestSample:
        body = {
            "model": self.plan.model,
            "prompt": prompt,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,  # a fixed output length, whatever the weights would say
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        payload = json.dumps(body).encode()
        arrivals: list[float] = []
        usage: dict[str, int] = {}
        start = time.perf_counter()
        try:
            self._read_events(payload, arrivals, usage)
            produced = usage.get("completion_tokens", 0)
            error = None if produced == self.output_tokens else f"{produced} tokens instead of {self.output_tokens}"
        except Exception as failure:  # whatever goes wrong with one request is a result of the test, not its end
            error = f"{type(failure).__name__}: {failure}"
        end = time.perf_counter()
        return RequestSample(
            concurrency=self.concurrency,
            start_s=start,
            end_to_end_s=end - start,
            ttft_s=arrivals[0] - start if arrivals else None,
            gaps_s=[later - earlier for earlier, later in itertools.pairwise(arrivals)],
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            error=error,
        )

    def _read_events(self, payload: bytes, arrivals: list[float], usage: dict[str, int]) -> None:
        """Send one request and read its server-sent events, noting arrival times and usage as they come."""
        with self.client.request("POST", PATH, payload, {"Content-Type": "application/json"}) as response:
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}: {response.read()[:300].decode(errors='replace')}")
            while line := response.readline(b"\n"):
                if not line.startswith(b"data: "):
                    continue
                now = time.perf_counter()
                data = line[len(b"data: ") :].strip()
                if data == b"[DONE]":
                    response.read()
                    return
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(event["error"].get("message", "unknown error"))
                if event.get("choices"):
                    arrivals.append(now)
                if event.get("usage"):
                    usage.update({key: value for key, value in event["usage"].items() if isinstance(value, int)})
        raise RuntimeError("the stream ended early")
