"""The client's half of NBD, small and slow, from the same declarations: the other end of two-ended tests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from blockrepl.formats import nbd
from blockrepl.formats.nbd import Command, Info, Option, OptionReply

FIXED = 3


def client_flags(flags: int = FIXED) -> bytes:
    data: bytes = nbd.client_flags.build({"flags": flags})
    return data


def option(number: int, data: bytes = b"") -> bytes:
    header: bytes = nbd.option_header.build({"option": number, "length_bytes": len(data)})
    return header + data


def go(name: str, *, number: int = Option.GO, wanted: tuple[int, ...] = (Info.BLOCK_SIZE,)) -> bytes:
    return option(number, nbd.info_request.build({"name": name.encode(), "requests": wanted}))


def request(command: int, cookie: int, offset: int, length: int, *, flags: int = 0, payload: bytes = b"") -> bytes:
    fields = {"flags": flags, "type": command, "cookie": cookie, "offset_bytes": offset, "length_bytes": length}
    header: bytes = nbd.request.build(fields)
    return header + payload


def write(cookie: int, offset: int, payload: bytes, *, flags: int = 0) -> bytes:
    return request(Command.WRITE, cookie, offset, len(payload), flags=flags, payload=payload)


@dataclass(frozen=True)
class OptionAnswer:
    option: int
    reply: int
    data: bytes


def option_answers(data: bytes) -> tuple[list[OptionAnswer], bytes]:
    """The answers at the front of ``data`` up to the end of the last whole one, and the rest."""
    answers = []
    while len(data) >= 20:
        parsed = nbd.option_reply.parse(data)
        answers.append(OptionAnswer(parsed.option, parsed.reply, parsed.data))
        data = data[20 + parsed.length_bytes :]
    return answers, data


class Client:
    """A connection to a server. One command at a time, or `send` and `replies` by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.flags = 0
        self.size_bytes = 0
        self._cookie = 0

    @classmethod
    async def connect(cls, address: tuple[str, int]) -> Client:
        reader, writer = await asyncio.open_connection(*address)
        client = cls(reader, writer)
        assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        return client

    @classmethod
    async def open(cls, address: tuple[str, int], name: str = "data") -> Client:
        client = await cls.connect(address)
        client.send(client_flags(), go(name))
        answer = await client.option_answer()
        while answer.reply != OptionReply.ACK:
            assert answer.reply == OptionReply.INFO, answer
            if answer.data[:2] == b"\0\0":
                info = nbd.info_export.parse(answer.data)
                client.flags, client.size_bytes = info.flags, info.size_bytes
            answer = await client.option_answer()
        return client

    def send(self, *messages: bytes) -> None:
        self.writer.write(b"".join(messages))

    async def option_answer(self) -> OptionAnswer:
        header = await self.reader.readexactly(20)
        length = int.from_bytes(header[16:], "big")
        parsed = nbd.option_reply.parse(header + await self.reader.readexactly(length))
        return OptionAnswer(parsed.option, parsed.reply, parsed.data)

    async def reply(self, lengths: dict[int, int] | None = None) -> tuple[int, int, bytes]:
        """(cookie, error, data); ``lengths`` says how much data the reads among the cookies asked for."""
        parsed = nbd.simple_reply.parse(await self.reader.readexactly(16))
        length = (lengths or {}).get(parsed.cookie, 0) if parsed.error == 0 else 0
        return parsed.cookie, parsed.error, await self.reader.readexactly(length)

    async def do(
        self, command: int, offset: int, length: int, *, flags: int = 0, payload: bytes = b""
    ) -> tuple[int, bytes]:
        """(error, data) of one command."""
        self._cookie += 1
        self.send(request(command, self._cookie, offset, length, flags=flags, payload=payload))
        wanted = {self._cookie: length} if command == Command.READ else {}
        cookie, error, data = await self.reply(wanted)
        assert cookie == self._cookie
        return error, data

    async def read(self, offset: int, length: int) -> bytes:
        error, data = await self.do(Command.READ, offset, length)
        assert error == 0
        return data

    async def write(self, offset: int, payload: bytes, *, flags: int = 0) -> None:
        error, _ = await self.do(Command.WRITE, offset, len(payload), flags=flags, payload=payload)
        assert error == 0

    async def ended(self) -> bool:
        """Wait for the server to close."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.close()
