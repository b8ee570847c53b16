"""Answers that end when the client does: a request whose client has gone must not keep the engine busy."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cast_serve.server.errors import APIError
from cast_serve.server.job import Job
from cast_serve.server.sse import DONE

CLIENT_CLOSED_REQUEST = 499  # nginx's status for "the client went away"; nobody receives it

_SHUTTING_DOWN = "the server is shutting down"

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def run_until_disconnect(receive: Receive, work: Coroutine[None, None, T]) -> T | None:
    """Return what `work` returns, or cancel it and return None when the client disconnects first.

    The request's body must have been read: the next message from `receive` is then the disconnection.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` as they come, while the client is there, and leaves `job` at the end.

    Unlike starlette's StreamingResponse it cancels the job at once when the client goes, and a failure under way
    becomes an error event instead of a broken connection.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncIterator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._job = job
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._job:
            await run_until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except (Exception, asyncio.CancelledError) as error:
            # The status line is out: all that is left is an error event, as OpenAI's API sends it.
            event = f"data: {json.dumps(_as_api_error(error).body())}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


def _as_api_error(error: BaseException) -> APIError:
    if isinstance(error, APIError):
        return error
    if isinstance(error, asyncio.CancelledError):  # or the client has gone, and nobody reads this
        return APIError(_SHUTTING_DOWN, code="shutting_down", status=503)
    logger.error("a stream failed", exc_info=error)
    return APIError("the server failed on this request; its log says why", status=500)


class EndOnShutdown:
    """ASGI middleware: what still runs when the server stops draining is cancelled, and gets an answer for goodbye."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not started:
                await APIError(_SHUTTING_DOWN, code="shutting_down", status=503).response()(scope, receive, send)
