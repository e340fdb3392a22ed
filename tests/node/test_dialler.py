"""What keeps a link up, and ends when it is told to."""

from __future__ import annotations

import asyncio
import socket

import pytest

from blockrepl.node.links import Dialler


class Links:
    """Takes the connection, and never says that it is lost."""

    number = 1

    def __init__(self) -> None:
        self.router = self
        self.socks: list[socket.socket] = []

    def add(self, sock: socket.socket, *, greeted: bool) -> Links:
        self.socks.append(sock)
        return self

    def settle(self) -> None:
        pass


@pytest.mark.parametrize("turns", range(24))
async def test_a_dialler_that_is_closed_when_its_connection_comes_up_ends(turns: int) -> None:
    """An intermediate that formed its group anew waited for ever for one that had forgotten its cancellation."""
    server = socket.create_server(("127.0.0.1", 0))
    host, port = server.getsockname()[:2]
    links = Links()
    dialler = Dialler(links, host, port, lambda link, nonce: None, "peer")  # type: ignore[arg-type]
    try:
        for _ in range(turns):
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(dialler.close())
        done, _ = await asyncio.wait([closing], timeout=5.0)
        assert done, "it does not end"
    finally:
        server.close()
        for sock in links.socks:
            sock.close()
