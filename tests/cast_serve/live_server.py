"""A real server on a free local port, in a thread of the test."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from cast_serve.server.app import create_app
from cast_serve.server.listen import bind
from cast_serve.server.model import ServedModel


@contextlib.contextmanager
def live_server(load: Callable[[], ServedModel], *, capacity: int = 64, wait: bool = True) -> Iterator[str]:
    """Yield the server's base URL, without a final slash."""
    ready = threading.Event()
    listener = bind("127.0.0.1", 0)
    app = create_app(load, capacity=capacity, on_ready=lambda model: ready.set())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        if wait:
            assert ready.wait(60)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait until `condition` holds; False if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
