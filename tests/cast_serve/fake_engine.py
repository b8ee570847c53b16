"""An engine with the real one's interface that says what the test tells it to."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from cast_serve.engine import EngineError
from cast_serve.engine.types import EngineStats, ModelInfo, SamplingParams, TokenEvent

Script = Callable[[list[int], SamplingParams], Iterable[int]]


class FakeGeneration:
    def __init__(self, engine: "FakeEngine", prompt_ids: list[int], params: SamplingParams) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self.cancelled = False
        self.produced = 0
        self._engine = engine

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        params = self.params
        for token in self._engine.script(self.prompt_ids, params):
            await asyncio.sleep(self._engine.delay)
            if self._engine.broken:
                raise EngineError("the step failed")
            if self.cancelled:
                return
            self.produced += 1
            self._engine.steps.append(1)
            reason = (
                "stop" if token in params.stop_token_ids else "length" if self.produced >= params.max_tokens else None
            )
            logprob = None if params.logprobs is None else -0.25
            top = tuple((token + i, -0.25 - i) for i in range(params.logprobs or 0))
            yield TokenEvent(token, logprob, top, reason)
            if reason:
                return
        raise AssertionError("the script is too short")


class FakeEngine:
    """Args:
    script: prompt, params -> the tokens to generate, as many as the request may take.
    delay: seconds before each token.
    """

    def __init__(self, script: Script, *, vocab_size: int, context_length: int = 200, delay: float = 0.0) -> None:
        self.script = script
        self.delay = delay
        self.broken = False
        self.failure: str | None = None
        self.closed = False
        self.generations: list[FakeGeneration] = []
        self.steps: list[int] = []
        self.info = ModelInfo(
            pattern="2:4",
            value_dtype="bfloat16",
            sparse_layers=14,
            weight_bytes=1000,
            sparse_weight_bytes=600,
            context_length=context_length,
            vocab_size=vocab_size,
            kernel="portable",
        )

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> FakeGeneration:
        self.generations.append(FakeGeneration(self, prompt_ids, params))
        return self.generations[-1]

    def stats(self) -> EngineStats:
        steps, self.steps = self.steps, []
        return EngineStats(running=1, waiting=2, kv_tokens_used=50, kv_tokens_total=200, batch_sizes=steps)

    def close(self) -> None:
        self.closed = True
