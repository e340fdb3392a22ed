"""Reads an NBD export from its beginning to its end: how an image is fetched from another node."""

from __future__ import annotations

import os
import socket

from blockrepl.definition import Address
from blockrepl.errors import BlockreplError, NotRunningError
from blockrepl.formats import nbd

TIMEOUT_S = 60.0
_FIXED_NO_ZEROES = 3  # client flags, both


class NbdReader:
    """One export, in transmission ("Fixed newstyle negotiation", NBD_OPT_EXPORT_NAME). Use as a context.

    Raises NotRunningError (nobody listens, or there is no such export), BlockreplError (a read failed).
    """

    def __init__(self, address: Address, export: str) -> None:
        self.name = f"nbd://{address}/{export}"
        try:
            self._sock = socket.create_connection((address.host, address.port), TIMEOUT_S)
        except OSError as error:
            raise NotRunningError(f"{self.name}: {error.strerror or error}", hint="see: blockrepl status") from error
        try:
            self.size_bytes = self._negotiate(export.encode())
        except OSError as error:
            self._sock.close()
            raise NotRunningError(f"{self.name} is not served now", hint="see: blockrepl status") from error

    def __enter__(self) -> NbdReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def _negotiate(self, name: bytes) -> int:
        nbd.greeting.parse(self._receive(nbd.greeting.sizeof()))
        option = nbd.option_header.build({"option": nbd.Option.EXPORT_NAME, "length_bytes": len(name)})
        self._sock.sendall(nbd.client_flags.build({"flags": _FIXED_NO_ZEROES}) + option + name)
        return int(nbd.export_name_reply.parse(self._receive(nbd.export_name_reply.sizeof())).size_bytes)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """What lies there."""
        fields = {
            "flags": 0, "type": nbd.Command.READ, "cookie": offset_bytes, "offset_bytes": offset_bytes,
            "length_bytes": length_bytes,
        }  # fmt: skip
        try:
            self._sock.sendall(nbd.request.build(fields))
            reply = nbd.simple_reply.parse(self._receive(nbd.simple_reply.sizeof()))
            if reply.error:
                raise OSError(reply.error, os.strerror(reply.error))
            return self._receive(length_bytes)
        except OSError as error:
            raise BlockreplError(f"{self.name}: cannot read at {offset_bytes}: {error}") from error

    def _receive(self, length_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < length_bytes:
            piece = self._sock.recv(length_bytes - len(data))
            if not piece:
                raise ConnectionResetError("the server closed the connection")
            data += piece
        return bytes(data)
