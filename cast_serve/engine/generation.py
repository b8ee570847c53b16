"""The stream of tokens of one request, from the engine's thread to whoever asked."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

from cast_serve.engine.types import TokenEvent


class EngineError(RuntimeError):
    """The engine could not go on with a request: a step failed, or the engine was closed."""


class Generation:
    """Iterate over it, from one thread (`for`) or one asyncio task (`async for`), to get the request's TokenEvents.

    The last event has a `finish_reason`. A cancelled generation ends without one; a failed one raises EngineError.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
        self._items: deque[TokenEvent | EngineError] = deque()
        self._ended = False
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Stop generating; does nothing if it has ended. Its cache blocks are free before the engine's next step."""
        with self._changed:
            if self._ended:
                return
            self.cancelled = True
        self.end()
        self._on_cancel()

    def put(self, event: TokenEvent) -> None:
        """Append an event (engine's thread); one with a finish reason is the last."""
        self._add(event, last=event.finish_reason is not None)

    def fail(self, message: str) -> None:
        """End with an EngineError."""
        self._add(EngineError(message), last=True)

    def end(self) -> None:
        """End without a further event."""
        self._add(None, last=True)

    def _add(self, item: TokenEvent | EngineError | None, *, last: bool) -> None:
        with self._changed:
            if self._ended:
                return
            if item is not None:
                self._items.append(item)
            self._ended = last
            waiter, self._waiter = self._waiter, None
            self._changed.notify()
        if waiter is not None:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is waiting any more
                loop.call_soon_threadsafe(_wake, future)

    def _pop(self) -> TokenEvent | None:
        """The next event, or None if there is none yet; call with the lock held."""
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, EngineError):
            raise item
        return item

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> TokenEvent:
        with self._changed:
            while (event := self._pop()) is None:
                if self._ended:
                    raise StopIteration
                self._changed.wait()
            return event

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> TokenEvent:
        while True:
            with self._changed:
                if (event := self._pop()) is not None:
                    return event
                if self._ended:
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = (loop, future)
            await future


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
