"""Requests too large to be meant are refused while they arrive: parsing one would hold up every other request."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 4 << 20  # bytes; a few hundred thousand tokens, as ids or as text


class LimitBody:
    """ASGI middleware: 413 for a request whose body is longer than MAX_BODY."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the body is longer than {MAX_BODY} bytes: send less at once")
            return message

        await self._app(scope, counted, send)
