"""Listening sockets of a front end's server: what the NBD and the iSCSI server share."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

from blockrepl.errors import UsageError

ACCEPT_PAUSE_S = 0.1  # after the process ran out of descriptors
BACKLOG = 1024


class Acceptor:
    """Accepts on the running loop. ``begin(sock, address)`` takes each connection over; it may raise OSError when the
    connection is gone already.
    """

    def __init__(self, what: str, begin: Callable[[socket.socket, Any], None]) -> None:
        """``what``: the front end's name, for errors."""
        self._what = what
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._listeners: list[socket.socket] = []

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept on an address; port 0 picks one. Returns the address bound. Raises UsageError."""
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            raise UsageError(f"{self._what}: cannot listen on {host}:{port}: {error.strerror}") from error
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            self.accept_from(listener)
        except OSError as error:
            listener.close()
            raise UsageError(f"{self._what}: cannot listen on {host}:{port}: {error.strerror}") from error
        bound = listener.getsockname()
        return bound[0], bound[1]

    def accept_from(self, listener: socket.socket) -> None:
        """Accept from a bound socket, until `close`. Raises OSError."""
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._listeners.append(listener)
        self._loop.add_reader(listener.fileno(), self._accept, listener)

    def close(self) -> None:
        """Accept no more."""
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._loop.remove_reader(listener.fileno())
                    self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again, listener)
                return
            try:
                self._begin(sock, address)
            except OSError:  # gone already
                sock.close()

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener.fileno(), self._accept, listener)
