"""A host that speaks NBD, one command at a time: for machines without loop devices, and for tests."""

from __future__ import annotations

import os
import re
import socket

from blockrepl.formats import nbd
from blockrepl.formats.nbd import Command, CommandFlag

_FIXED_NO_ZEROES = 3
_URI = re.compile(r"nbd://([^:/]+):(\d+)/(.+)")


class NbdVolume:
    """An export. Errors of the server and of the network are OSError."""

    def __init__(self, uri: str, timeout_s: float = 60.0) -> None:
        match = _URI.fullmatch(uri)
        if match is None:
            raise ValueError(f"{uri} is no nbd://HOST:PORT/EXPORT")
        self._cookie = 0
        self._sock = socket.create_connection((match[1], int(match[2])), timeout_s)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.size_bytes = self._negotiate(match[3].encode())
        except BaseException:
            self._sock.close()
            raise

    def _negotiate(self, name: bytes) -> int:
        nbd.greeting.parse(self._receive(nbd.greeting.sizeof()))
        header = nbd.option_header.build({"option": nbd.Option.EXPORT_NAME, "length_bytes": len(name)})
        self._sock.sendall(nbd.client_flags.build({"flags": _FIXED_NO_ZEROES}) + header + name)
        return int(nbd.export_name_reply.parse(self._receive(nbd.export_name_reply.sizeof())).size_bytes)

    def write(self, offset_bytes: int, payload: bytes, *, durable: bool = False) -> None:
        """With ``durable`` (FUA) it returns when the data is durable."""
        self._do(Command.WRITE, offset_bytes, len(payload), CommandFlag.FUA if durable else 0, payload)

    def zero(self, offset_bytes: int, length_bytes: int, *, durable: bool = False) -> None:
        """Write zeroes."""
        self._do(Command.WRITE_ZEROES, offset_bytes, length_bytes, CommandFlag.FUA if durable else 0)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """What lies there."""
        self._do(Command.READ, offset_bytes, length_bytes)
        return self._receive(length_bytes)

    def flush(self) -> None:
        """All that was written is durable when it returns."""
        self._do(Command.FLUSH, 0, 0)

    def _do(self, command: int, offset_bytes: int, length_bytes: int, flags: int = 0, payload: bytes = b"") -> None:
        self._cookie += 1
        fields = {
            "flags": flags, "type": command, "cookie": self._cookie, "offset_bytes": offset_bytes,
            "length_bytes": length_bytes,
        }  # fmt: skip
        self._sock.sendall(nbd.request.build(fields) + payload)
        reply = nbd.simple_reply.parse(self._receive(nbd.simple_reply.sizeof()))
        if reply.cookie != self._cookie:
            raise OSError(f"reply to command {reply.cookie}, not to {self._cookie}")
        if reply.error:
            raise OSError(reply.error, os.strerror(reply.error))

    def _receive(self, length_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < length_bytes:
            piece = self._sock.recv(min(1 << 20, length_bytes - len(data)))
            if not piece:
                raise ConnectionResetError("the server closed the connection")
            data += piece
        return bytes(data)

    def close(self) -> None:
        """Leave without a word: what was not answered may or may not have happened."""
        self._sock.close()
