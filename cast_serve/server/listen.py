"""Taking the address to serve on, before anything slow happens."""

import errno
import socket

from conversion.errors import InputError


def bind(host: str, port: int) -> socket.socket:
    """Listen on an address (port 0: any free port); InputError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay (40 ms of a first token) off only on sockets that say TCP, so the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # SO_REUSEADDR lets two sockets bind one port: only listening makes it ours
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} on {host} is in use: stop what uses it or choose another --port") from None
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return listener
