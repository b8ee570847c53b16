"""From a validated request to its HTTP response, for both endpoints that generate text."""

import contextlib
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from cast_serve.engine.types import FinishReason, SamplingParams, TokenEvent
from cast_serve.server.job import Admission, Job
from cast_serve.server.metrics import ServerMetrics
from cast_serve.server.model import ServedModel
from cast_serve.server.protocol import GenerationRequest, Usage
from cast_serve.server.sse import ChunkWriter
from cast_serve.server.streaming import CLIENT_CLOSED_REQUEST, EventStream, run_until_disconnect

RequestT = TypeVar("RequestT", bound=GenerationRequest)
Tokens = Sequence[tuple[int, TokenEvent]]


@dataclass
class Choice:
    """One finished choice of a response that is not streamed."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[tuple[int, TokenEvent]] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Answer(ABC, Generic[RequestT]):
    """How one endpoint reads a request and words its answer.

    Args:
        model: the served model.
        request: a validated request.

    Raises:
        APIError: the request cannot be served.
    """

    id_prefix: str
    chunk_object: str
    chunk_writer: type[ChunkWriter]

    def __init__(self, model: ServedModel, request: RequestT) -> None:
        model.require_name(request.model)
        request.refuse_unsupported()
        self.model = model
        self.request = request
        self.envelope: dict[str, Any] = {
            "id": f"{self.id_prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    @abstractmethod
    async def prompts(self) -> list[tuple[list[int], SamplingParams]]:
        """Token ids and how to sample, for each prompt of the request."""

    @abstractmethod
    def logprobs(self, index: int, tokens: Tokens) -> dict[str, Any] | None:
        """The log-probabilities of choice `index` in the endpoint's form; None if the request wants none."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        """The body of a response that is not streamed."""

    def prefix(self, index: int) -> str:
        """Text that choice `index` shows before what is generated."""
        return ""

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The request's parameters for the engine."""
        request = self.request
        eos = frozenset() if request.ignore_eos else self.model.eos_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_token_ids=eos | frozenset(request.stop_token_ids),
            logprobs=logprobs,
        )


async def respond(answer: Answer[Any], http: Request, metrics: ServerMetrics, admission: Admission) -> Response:
    """Generate, and answer in one body or as a stream."""
    request, arrived = answer.request, time.perf_counter()
    with contextlib.ExitStack() as undo:
        admission.take(request.sequences)  # first: what there is no room for is not worth tokenizing
        undo.callback(admission.give_back, request.sequences)
        prompts = await answer.prompts()
        job = Job(answer.model, metrics, undo, prompts, n=request.n, stops=request.stop, arrived=arrived)
    if request.stream:
        return EventStream(job, _events(answer, job))
    with job:
        choices = await run_until_disconnect(http.receive, _collect(job))
        if choices is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(answer.whole(choices, job.usage()).model_dump_json(), media_type="application/json")


async def _events(answer: Answer[Any], job: Job) -> AsyncIterator[bytes]:
    """A chunk per token, also for one whose text is still held back, so that the stream keeps the engine's pace."""
    writer = answer.chunk_writer(
        answer.envelope | {"object": answer.chunk_object}, include_usage=answer.request.include_usage
    )
    started: set[int] = set()
    async for index, delta in job.deltas():
        text = delta.text
        first = index not in started
        if first:
            started.add(index)
            text = answer.prefix(index) + text
        logprobs = answer.logprobs(index, delta.tokens)
        yield writer.chunk(index, text, first=first, logprobs=logprobs, finish_reason=delta.finish_reason)
    if answer.request.include_usage:
        yield writer.usage(job.usage())


async def _collect(job: Job) -> list[Choice]:
    choices = [Choice() for _ in range(job.count)]
    async for index, delta in job.deltas():
        choice = choices[index]
        choice.pieces.append(delta.text)
        choice.tokens.extend(delta.tokens)
        choice.finish_reason = delta.finish_reason or choice.finish_reason
    return choices
