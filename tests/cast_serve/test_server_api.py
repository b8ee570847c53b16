"""The API as the official client sees it, against a real server whose engine says what the test wants."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cast_serve.engine import EngineError
from cast_serve.engine.types import SamplingParams
from cast_serve.server.chat_template import ChatTemplate
from cast_serve.server.model import ServedModel
from cast_serve.server.tokenizer import Tokenizer
from tests.cast_serve import tiny_tokenizers
from tests.cast_serve.fake_engine import FakeEngine
from tests.cast_serve.live_server import eventually, live_server

TEMPLATE = """{% for m in messages %}
{% if m.role == 'refused' %}{{ raise_exception('only users may speak') }}{% endif %}
{{ m.role }}: {{ m.content + '\n' }}
{%- endfor %}assistant:"""
REPLY = "Hello 🙂 world, the lazy dog"
EOS = 2
VOCABULARY = 321


class Served:
    """A fake model behind a real server. `reply` is what it says to everything; then it repeats the end token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reply = REPLY
        self.engine = FakeEngine(self._script, vocab_size=VOCABULARY)
        self.url = ""

    def _script(self, prompt_ids: list[int], params: SamplingParams) -> Iterable[int]:
        yield from self.reply_ids
        while True:
            yield EOS

    @property
    def reply_ids(self) -> list[int]:
        return self.tokenizer.encode(self.reply)

    def load(self) -> ServedModel:
        return ServedModel(
            name="tiny",
            engine=self.engine,  # type: ignore[arg-type]
            tokenizer=self.tokenizer,
            chat_template=ChatTemplate(TEMPLATE, {}),
            eos_token_ids=frozenset({EOS}),
            fingerprint="cast-test",
        )

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics: name with sorted labels -> value."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        return {
            f"{sample.name}{sorted(sample.labels.items())}" if sample.labels else sample.name: sample.value
            for family in families
            for sample in family.samples
        }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny_tokenizers.byte_level().save(str(path))
    return Tokenizer(path)


@pytest.fixture
def served(tokenizer: Tokenizer) -> Iterator[Served]:
    served = Served(tokenizer)
    with live_server(served.load, capacity=4) as served.url:
        yield served


def ask(text: str = "Hi") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# completions


def test_completion(served: Served) -> None:
    answer = served.client.completions.create(model="tiny", prompt="Hello", max_tokens=100, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (REPLY, "stop", None)
    assert answer.object == "text_completion"
    assert answer.system_fingerprint == "cast-test"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(served.tokenizer.encode("Hello"))
    assert answer.usage.completion_tokens == len(served.reply_ids) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_sampling_parameters_reach_the_engine(served: Served) -> None:
    served.client.completions.create(
        model="tiny",
        prompt="a",
        n=2,
        seed=7,
        temperature=0.5,
        top_p=0.25,
        max_tokens=3,
        extra_body={"stop_token_ids": [9]},
    )
    first, second = (generation.params for generation in served.engine.generations)
    assert first == SamplingParams(
        max_tokens=3, temperature=0.5, top_p=0.25, seed=7, stop_token_ids=frozenset({EOS, 9}), logprobs=None
    )
    assert second.seed == 8


def test_defaults_are_openais(served: Served) -> None:
    served.client.completions.create(model="tiny", prompt="a")
    assert served.engine.generations[0].params == SamplingParams(stop_token_ids=frozenset({EOS}))
    served.client.chat.completions.create(model="tiny", messages=ask())  # type: ignore[arg-type]
    chat = served.engine.generations[1]
    assert chat.params.max_tokens == served.engine.info.context_length - len(chat.prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_and_choices_come_in_order(served: Served, stream: bool) -> None:
    prompts = [[5, 6], [7, 8, 9]]
    answer = served.client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=50, echo=True, stream=stream
    )
    texts = [""] * 4
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    echoes = [served.tokenizer.decode(prompt) for prompt in prompts]
    assert texts == [echo + REPLY for echo in echoes for _ in range(2)]
    assert [generation.prompt_ids for generation in served.engine.generations] == [[5, 6], [5, 6], [7, 8, 9], [7, 8, 9]]


def test_list_of_strings_and_token_ids(served: Served) -> None:
    served.client.completions.create(model="tiny", prompt=["Hello", "fox"])
    served.client.completions.create(model="tiny", prompt=[4, 5, 6])
    encode = served.tokenizer.encode
    assert [g.prompt_ids for g in served.engine.generations] == [encode("Hello"), encode("fox"), [4, 5, 6]]


def test_max_tokens_and_ignore_eos(served: Served) -> None:
    answer = served.client.completions.create(model="tiny", prompt="a", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == served.tokenizer.decode(served.reply_ids[:2])
    answer = served.client.completions.create(model="tiny", prompt="a", max_tokens=60, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (60, "length")


def test_completion_logprobs(served: Served) -> None:
    answer = served.client.completions.create(model="tiny", prompt="a", max_tokens=100, logprobs=2)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-0.25] * len(served.reply_ids)
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert "\\x" in token or choice.text[offset:].startswith(token)
    assert [top[token] for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)] == [-0.25] * len(
        served.reply_ids
    )
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


# stop strings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["o w", ["zzz", " world", "lo 🙂 world"], "🙂"])
def test_stop_string_is_cut_and_cancels(served: Served, stop: str | list[str], stream: bool) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    served.reply = "Hello 🙂 wo world, the lazy dog"
    answer = served.client.completions.create(model="tiny", prompt="a", max_tokens=50, stop=stop, stream=stream)
    pieces, reasons = [], []
    for chunk in answer if stream else [answer]:
        pieces.append(chunk.choices[0].text)
        reasons.append(chunk.choices[0].finish_reason)
    assert "".join(pieces) == served.reply[: min(served.reply.find(s) for s in stops if s in served.reply)]
    assert reasons[-1] == "stop"
    assert eventually(lambda: served.engine.generations[0].cancelled)
    assert served.engine.generations[0].produced < len(served.reply_ids)


def test_logprobs_end_with_the_text_at_a_stop_string(served: Served) -> None:
    answer = served.client.completions.create(model="tiny", prompt="a", max_tokens=50, stop=" world", logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    text = "".join(t.encode("latin-1", "ignore").decode() for t in logprobs.tokens if "\\x" not in t)
    assert text.replace(" ", "") == "Hello"
    assert answer.choices[0].text == "Hello 🙂"


def test_stop_token_shows_no_text(served: Served) -> None:
    stop = served.reply_ids[3]
    answer = served.client.completions.create(model="tiny", prompt="a", extra_body={"stop_token_ids": [stop]})
    assert answer.choices[0].finish_reason == "stop"
    assert REPLY.startswith(answer.choices[0].text)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


# chat


def test_chat(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "fox"}]},
        ],
        n=2,
        user="somebody",
        presence_penalty=0,
    )
    assert [choice.message.content for choice in answer.choices] == [REPLY, REPLY]
    assert answer.choices[0].message.role == "assistant"
    prompt = "system: Be kind.\nuser: Hello\nfox\nassistant:"
    assert served.engine.generations[0].prompt_ids == served.tokenizer.encode(prompt, special=False)


def test_chat_logprobs_give_the_bytes_of_each_token(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model="tiny",
        messages=ask(),
        logprobs=True,
        top_logprobs=3,  # type: ignore[arg-type]
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(token.bytes or []) for token in logprobs.content).decode() == REPLY
    assert all(len(token.top_logprobs) == 3 and token.logprob == -0.25 for token in logprobs.content)


def test_chat_stream(served: Served) -> None:
    chunks = list(
        served.client.chat.completions.create(
            model="tiny",
            messages=ask(),  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
        )
    )
    *deltas, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(served.reply_ids) + 1 == len(deltas)  # a chunk per token
    assert [chunk.choices[0].delta.role for chunk in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert (
        len({(chunk.id, chunk.created, chunk.object, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    )
    assert deltas[0].object == "chat.completion.chunk"
    tokens = [token for chunk in deltas for token in chunk.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert len(tokens) == len(served.reply_ids)


def test_stream_ends_with_done_and_usage_is_null_before(served: Served) -> None:
    body = {"model": "tiny", "prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{served.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    parsed = [json.loads(event) for event in events[:-2]]
    assert all(event["usage"] is None for event in parsed[:-1])
    assert set(parsed[-1]["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}


def test_async_client_streams_at_once(served: Served) -> None:
    served.engine.delay = 0.01
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    order: list[int] = []

    async def one(number: int) -> str:
        text = ""
        stream = await client.chat.completions.create(model="tiny", messages=ask(), stream=True)  # type: ignore[arg-type]
        async for chunk in stream:
            order.append(number)
            text += chunk.choices[0].delta.content or ""
        return text

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one(number) for number in range(4)))

    assert asyncio.run(all_of_them()) == [REPLY] * 4
    assert order != sorted(order)  # interleaved, not one after the other


# models, health, metrics


def test_models(served: Served) -> None:
    (model,) = served.client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    card = served.client.models.retrieve("tiny").model_dump()
    assert card["cast24"] == {
        "pattern": "2:4",
        "value_dtype": "bfloat16",
        "sparse_layers": 14,
        "weight_bytes": 1000,
        "sparse_weight_bytes": 600,
        "kernel": "portable",
        "context_length": 200,
    }
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other/model")


def test_health_says_503_until_the_model_is_there(tokenizer: Tokenizer) -> None:
    served = Served(tokenizer)
    go = threading.Event()

    def load() -> ServedModel:
        go.wait()
        return served.load()

    with live_server(load, wait=False) as url:
        assert httpx.get(f"{url}/health").status_code == 503
        answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert httpx.get(f"{url}/metrics").status_code == 200
        go.set()
        assert eventually(lambda: httpx.get(f"{url}/health").status_code == 200)
    assert served.engine.closed


def test_metrics_parse_and_move(served: Served) -> None:
    before = served.metrics()
    assert before["cast:weight_bytes"] == 1000
    assert before["cast:sparse_weight_bytes"] == 600
    assert before["cast:sparse_layers"] == 14
    assert before["cast:resident_memory_bytes"] > 1e6
    assert before["cast:kv_cache_usage_perc"] == 0.25
    assert (before["cast:num_requests_running"], before["cast:num_requests_waiting"]) == (1, 2)
    assert any(name.startswith("cast:model_info") and "'2:4'" in name and "'portable'" in name for name in before)
    served.client.completions.create(model="tiny", prompt=[4, 5, 6], max_tokens=5)
    served.client.chat.completions.create(model="tiny", messages=ask())  # type: ignore[arg-type]
    httpx.post(f"{served.url}/v1/completions", content=b"{")
    after = served.metrics()
    moved = {name: after[name] - before.get(name, 0) for name in after}
    chat_tokens = len(served.reply_ids) + 1
    assert moved["cast:generation_tokens_total"] == 5 + chat_tokens
    assert moved["cast:prompt_tokens_total"] == 3 + len(served.engine.generations[1].prompt_ids)
    assert moved["cast:time_to_first_token_seconds_count"] == 2
    assert moved["cast:inter_token_latency_seconds_count"] == 4 + chat_tokens - 1
    assert moved["cast:e2e_request_latency_seconds_count"] == 2
    assert moved["cast:iteration_batch_size_count"] == 5 + chat_tokens
    assert moved["cast:request_success_total[('finished_reason', 'length')]"] == 1
    assert moved["cast:request_success_total[('finished_reason', 'stop')]"] == 1
    assert moved["cast:http_requests_total[('route', '/v1/completions'), ('status', '200')]"] == 1
    assert moved["cast:http_requests_total[('route', '/v1/completions'), ('status', '400')]"] == 1


# disconnects, overload, failures


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels(served: Served, stream: bool) -> None:
    served.engine.delay = 0.02
    body = {"model": "tiny", "prompt": "a", "n": 2, "max_tokens": 190, "ignore_eos": True, "stream": stream}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=0.2) as answer,
    ):
        next(answer.iter_lines())
    assert eventually(lambda: len(served.engine.generations) == 2, 1)
    assert eventually(lambda: all(generation.cancelled for generation in served.engine.generations), 1)
    assert all(generation.produced < 190 for generation in served.engine.generations)
    status = "200" if stream else "499"
    name = f"cast:http_requests_total[('route', '/v1/completions'), ('status', '{status}')]"
    assert eventually(lambda: served.metrics().get(name) == 1)


def test_full_queue_is_429_and_frees_itself(served: Served) -> None:
    served.engine.delay = 0.01
    with httpx.stream(
        "POST",
        f"{served.url}/v1/completions",
        json={"model": "tiny", "prompt": "a", "n": 4, "max_tokens": 190, "ignore_eos": True, "stream": True},
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
            served.client.completions.create(model="tiny", prompt="a")
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.code == "queue_full"

    def accepted() -> bool:
        try:
            return bool(served.client.completions.create(model="tiny", prompt=["a"] * 4, max_tokens=1))
        except openai.RateLimitError:
            return False

    assert eventually(accepted)


def test_more_sequences_than_the_server_ever_takes(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="5 sequences, more than the 4"):
        served.client.completions.create(model="tiny", prompt="a", n=5)


def test_prompts_without_room_are_not_tokenized(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.tokenizer, "encode", None)
    with pytest.raises(openai.BadRequestError, match="10000 sequences, more than the 4"):
        served.client.completions.create(model="tiny", prompt=["a"] * 5000, n=2)


def test_many_short_prompts_are_tokenized_in_a_thread(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, threads = served.tokenizer.encode, set()

    def noted(text: str, *, special: bool = True) -> list[int]:
        if len(text) == 4000:  # not the reply
            threads.add(threading.current_thread().name)
        return encode(text, special=special)[:4]

    monkeypatch.setattr(served.tokenizer, "encode", noted)
    served.client.completions.create(model="tiny", prompt=["a" * 4000] * 3, max_tokens=1)
    assert len(threads) == 1
    assert "asyncio" in threads.pop()


def test_first_token_is_timed_from_the_requests_arrival(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = served.tokenizer.encode
    monkeypatch.setattr(
        served.tokenizer, "encode", lambda text, **options: (time.sleep(0.2), encode(text, **options))[1]
    )
    served.client.completions.create(model="tiny", prompt="a", max_tokens=1)
    metrics = served.metrics()
    assert metrics["cast:time_to_first_token_seconds_sum"] >= 0.2
    assert metrics["cast:e2e_request_latency_seconds_sum"] >= 0.2


def test_an_unexpected_exception_is_a_500_and_counted_as_one(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "submit", None)
    with pytest.raises(openai.InternalServerError, match="its log says why"):
        served.client.completions.create(model="tiny", prompt="a")
    name = "cast:http_requests_total[('route', '/v1/completions'), ('status', '{}')]"
    metrics = served.metrics()
    assert (metrics.get(name.format(500)), metrics.get(name.format(499))) == (1, None)


def test_health_fails_with_the_engine(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(*arguments: object) -> None:
        raise EngineError("the engine has stopped: no luck")

    served.engine.failure = "the engine has stopped: no luck"
    monkeypatch.setattr(served.engine, "submit", submit)
    health = httpx.get(f"{served.url}/health")
    assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_error")
    with pytest.raises(openai.InternalServerError, match="no luck"):
        served.client.completions.create(model="tiny", prompt="a")


def test_engine_failure_is_a_500_or_an_error_event(served: Served) -> None:
    served.engine.broken = True
    with pytest.raises(openai.InternalServerError):
        served.client.completions.create(model="tiny", prompt="a")
    with pytest.raises(openai.APIError, match="the step failed"):
        list(served.client.completions.create(model="tiny", prompt="a", stream=True))
    with pytest.raises(openai.APIError, match="the step failed"):
        list(served.client.completions.create(model="tiny", prompt="a", n=3, stream=True))
    served.engine.broken = False
    assert served.client.completions.create(model="tiny", prompt="a", n=4).choices
