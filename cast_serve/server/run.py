"""Runs the application on a socket until a signal, and reports how it went."""

import signal
import socket
from collections.abc import Callable

import uvicorn

from cast_serve.server.app import create_app
from cast_serve.server.model import ServedModel

_DRAIN_SECONDS = 5  # how long running answers may go on after SIGTERM
_KEEP_ALIVE_SECONDS = 75  # nginx's default; uvicorn's 5 s closes connections that clients' pools still count on


def run(listener: socket.socket, load: Callable[[], ServedModel], *, capacity: int) -> None:
    """Serve on `listener` until SIGINT or SIGTERM; returns after draining.

    Raises:
        Exception: what `load` raised, if the model could not be loaded.
    """
    failure: list[Exception] = []

    def give_up(error: Exception) -> None:
        failure.append(error)
        server.should_exit = True

    def announce(model: ServedModel) -> None:
        print(ready_line(listener, model), flush=True)

    app = create_app(load, capacity=capacity, on_ready=announce, on_failure=give_up)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
    )
    # uvicorn raises a signal it was stopped by again, for these handlers: being told to stop is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    if failure:
        raise failure[0]


def ready_line(listener: socket.socket, model: ServedModel) -> str:
    host, port = listener.getsockname()[:2]
    info = model.engine.info
    return (
        f"ready: http://{f'[{host}]' if ':' in host else host}:{port}/v1 serves {model.name}: "
        f"{info.pattern} {info.value_dtype}, {info.sparse_layers} sparse linears, fused ({info.kernel} kernel), "
        f"{info.weight_bytes / 1e6:.0f} MB of weights, context {info.context_length}"
    )
