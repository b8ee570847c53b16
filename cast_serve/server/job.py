"""One request's generations, from admission to the last token."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from cast_serve.engine import EngineError
from cast_serve.engine.types import SamplingParams
from cast_serve.server.choice import ChoiceText, Delta
from cast_serve.server.errors import APIError
from cast_serve.server.metrics import ChoiceTimer, ServerMetrics
from cast_serve.server.model import ServedModel
from cast_serve.server.protocol import Usage

_SEED_RANGE = 2**63


@dataclass
class Admission:
    """Bounds how many sequences are in the server at once, running or waiting.

    Attributes:
        capacity: most sequences: those of a full batch and those that may wait for it.
        admitted: sequences in the server now.
    """

    capacity: int
    admitted: int = 0

    def take(self, count: int) -> None:
        if count > self.capacity:
            raise APIError(f"the request asks for {count} sequences, more than the {self.capacity} this server takes")
        if self.admitted + count > self.capacity:
            raise APIError(
                "the queue is full: try again later",
                code="queue_full",
                status=429,
                headers={"Retry-After": "1"},
            )
        self.admitted += count

    def give_back(self, count: int) -> None:
        self.admitted -= count


class Job:
    """A context manager around `n` generations for each prompt; leaving it cancels what still runs.

    Args:
        undo: what is to be undone in the end, too; the job takes it over if it can be made.
        prompts: token ids and how to sample, per prompt.
        n: choices per prompt; choice `i` of a prompt is sampled with `seed + i`.
        stops: stop strings.
        arrived: when the request had been read, by `time.perf_counter`.
    """

    def __init__(
        self,
        model: ServedModel,
        metrics: ServerMetrics,
        undo: contextlib.ExitStack,
        prompts: Sequence[tuple[list[int], SamplingParams]],
        *,
        n: int,
        stops: Sequence[str],
        arrived: float,
    ) -> None:
        self.prompt_tokens = sum(len(prompt_ids) for prompt_ids, _ in prompts)
        self._metrics = metrics
        self._arrived = arrived
        self.count = len(prompts) * n
        self._generations = []
        self._texts = []
        for prompt_ids, params in prompts:
            for choice in range(n):
                try:
                    generation = model.engine.submit(prompt_ids, _with_seed(params, choice))
                except EngineError as error:
                    raise _api_error(error) from error
                undo.callback(generation.cancel)
                self._generations.append(generation)
                self._texts.append(ChoiceText(model.tokenizer, stops, logprobs=params.logprobs is not None))
        self._undo = undo.pop_all()
        metrics.prompt_tokens.inc(self.prompt_tokens)

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def usage(self) -> Usage:
        """Tokens so far."""
        completion = sum(text.completion_tokens for text in self._texts)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion,
            total_tokens=self.prompt_tokens + completion,
        )

    def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(choice index, what a token adds to it), as the tokens come."""
        if self.count == 1:
            return self._choice(0)
        return _merge([self._choice(index) for index in range(self.count)])

    async def _choice(self, index: int) -> AsyncIterator[tuple[int, Delta]]:
        generation, text = self._generations[index], self._texts[index]
        timer = ChoiceTimer(self._metrics, self._arrived)
        try:
            async for event in generation:
                timer.token()
                delta = text.feed(event)
                if delta.finish_reason is not None:
                    timer.finished(delta.finish_reason)
                    generation.cancel()  # a stop string ends a choice that the engine would go on with
                    yield index, delta
                    return
                yield index, delta
        except EngineError as error:
            raise _api_error(error) from error


def _api_error(error: EngineError) -> APIError:
    return APIError(f"the engine failed: {error}", code="engine_error", status=500)


def _with_seed(params: SamplingParams, choice: int) -> SamplingParams:
    return params if params.seed is None else replace(params, seed=(params.seed + choice) % _SEED_RANGE)


async def _merge(streams: Sequence[AsyncIterator[tuple[int, Delta]]]) -> AsyncIterator[tuple[int, Delta]]:
    """Items of all streams in the order of their arrival; the first failure ends it."""
    items: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[tuple[int, Delta]]) -> None:
        try:
            async for item in stream:
                items.put_nowait(item)
        finally:
            items.put_nowait(None)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(pumps)
        while running:
            item = await items.get()
            if item is not None:
                yield item
                continue
            running -= 1
            for task in pumps:
                if task.done():
                    task.result()  # raises what its stream raised
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
