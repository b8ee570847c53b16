"""What /metrics shows, in Prometheus text format. Names follow vLLM's where it has the same thing, with prefix `cast:`.

Counters
    cast:http_requests_total{route, status}        answered HTTP requests; status 499: the client went away first
    cast:request_success_total{finished_reason}    finished choices: stop, length
    cast:prompt_tokens_total, cast:generation_tokens_total
Histograms, in seconds, per choice
    cast:time_to_first_token_seconds               request read -> first token
    cast:inter_token_latency_seconds               token -> next token
    cast:e2e_request_latency_seconds               request read -> last token
Histogram of the engine
    cast:iteration_batch_size                      sequences in each engine step
Gauges
    cast:num_requests_running, cast:num_requests_waiting   sequences in the batch, and in the queue before it
    cast:kv_cache_usage_perc                       used share of the KV cache, 0 to 1
    cast:resident_memory_bytes                     resident set size, memory-mapped weights in use included
    cast:weight_bytes, cast:sparse_weight_bytes    bytes of all weights, and of the packed 2:4 linears among them
    cast:sparse_layers                             linears that the 2:4 kernel executes
    cast:model_info{model_name, pattern, value_dtype, kernel, context_length}   always 1
Besides: the standard process_* metrics of prometheus-client, such as process_cpu_seconds_total.
"""

import threading
import time

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cast_serve.engine.types import EngineStats, ModelInfo

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.http_requests = Counter(
            "cast:http_requests", "Answered HTTP requests.", ["route", "status"], registry=registry
        )
        self.prompt_tokens = Counter("cast:prompt_tokens", "Prompt tokens accepted.", registry=registry)
        self.generation_tokens = Counter("cast:generation_tokens", "Tokens generated.", registry=registry)
        self._success = Counter(
            "cast:request_success", "Finished choices by reason.", ["finished_reason"], registry=registry
        )
        self._success_by = {reason: self._success.labels(reason) for reason in ("stop", "length")}
        self.first_token = Histogram(
            "cast:time_to_first_token_seconds", "Request read to first token.", buckets=_SECONDS, registry=registry
        )
        self.inter_token = Histogram(
            "cast:inter_token_latency_seconds", "Time between two tokens.", buckets=_SECONDS, registry=registry
        )
        self.end_to_end = Histogram(
            "cast:e2e_request_latency_seconds", "Request read to last token.", buckets=_SECONDS, registry=registry
        )
        self._batch_size = Histogram(
            "cast:iteration_batch_size", "Sequences in an engine step.", buckets=_SEQUENCES, registry=registry
        )
        self._running = Gauge("cast:num_requests_running", "Sequences being generated.", registry=registry)
        self._waiting = Gauge("cast:num_requests_waiting", "Sequences in the queue.", registry=registry)
        self._kv_usage = Gauge("cast:kv_cache_usage_perc", "Used share of the KV cache, 0 to 1.", registry=registry)
        self._scrape = threading.Lock()
        memory = Gauge("cast:resident_memory_bytes", "Resident set size of the server process.", registry=registry)
        memory.set_function(lambda: psutil.Process().memory_info().rss)
        ProcessCollector(registry=registry)

    def describe_model(self, name: str, info: ModelInfo) -> None:
        """Add the gauges that say what was loaded."""
        for metric, text, value in (
            ("cast:weight_bytes", "Bytes of all weights.", info.weight_bytes),
            ("cast:sparse_weight_bytes", "Bytes of the packed 2:4 linears.", info.sparse_weight_bytes),
            ("cast:sparse_layers", "Linears that the 2:4 kernel executes.", info.sparse_layers),
        ):
            Gauge(metric, text, registry=self.registry).set(value)
        labels = {
            "model_name": name,
            "pattern": info.pattern,
            "value_dtype": info.value_dtype,
            "kernel": info.kernel,
            "context_length": str(info.context_length),
        }
        Gauge("cast:model_info", "What is served.", list(labels), registry=self.registry).labels(**labels).set(1)

    def finished(self, reason: str) -> None:
        """Count one finished choice."""
        if reason in self._success_by:
            self._success_by[reason].inc()

    def render(self, stats: EngineStats | None) -> bytes:
        """The text to scrape; `stats` is the engine's newest snapshot, None before there is an engine."""
        with self._scrape:
            if stats is not None:
                self._running.set(stats.running)
                self._waiting.set(stats.waiting)
                self._kv_usage.set(stats.kv_tokens_used / max(stats.kv_tokens_total, 1))
                for size in stats.batch_sizes:
                    self._batch_size.observe(size)
            return generate_latest(self.registry)


class ChoiceTimer:
    """Times the tokens of one choice into the metrics.

    Args:
        arrived: when its request had been read, by `time.perf_counter`.
    """

    def __init__(self, metrics: ServerMetrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last = 0.0

    def token(self) -> None:
        now = time.perf_counter()
        if self._last:
            self._metrics.inter_token.observe(now - self._last)
        else:
            self._metrics.first_token.observe(now - self._arrived)
        self._last = now
        self._metrics.generation_tokens.inc()

    def finished(self, reason: str) -> None:
        self._metrics.end_to_end.observe(time.perf_counter() - self._arrived)
        self._metrics.finished(reason)


class CountRequests:
    """ASGI middleware that counts answers by route and status."""

    _ROUTES = frozenset({"/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"})

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._counter = metrics.http_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        except Exception:
            status = status or 500  # the answer is made outside of this middleware
            raise
        finally:
            self._counter.labels(self._route(scope["path"]), str(status or 499)).inc()

    def _route(self, path: str) -> str:
        if path in self._ROUTES:
            return path
        return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"
