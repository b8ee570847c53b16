"""The listening socket."""

import asyncio
import socket

from cast_serve.server.listen import bind


def test_small_writes_leave_at_once() -> None:
    """With Nagle's algorithm on, a streamed token waits up to 40 ms for the client to acknowledge the one before."""

    async def delay_is_off() -> bool:
        listener = bind("127.0.0.1", 0)
        seen: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            seen.set_result(bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        server = await asyncio.start_server(accepted, sock=listener)
        async with server:
            _, client = await asyncio.open_connection(*listener.getsockname())
            try:
                return await asyncio.wait_for(seen, 5)
            finally:
                client.close()

    assert asyncio.run(delay_is_off())
