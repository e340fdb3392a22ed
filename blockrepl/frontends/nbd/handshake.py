"""The server's half of the fixed newstyle handshake, without I/O.

                 client flags            option (answered)
    FLAGS ----------------------> OPTIONS ---+
      |                            |  ^      |
      |                            |  +------+
      |                            +--- GO, EXPORT_NAME --> TRANSMISSION
      +---- unknown flags ---------+--- ABORT, violation --> CLOSED

Source: NBD doc/proto.md, "Handshake", "Option types", "Option reply types".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto

import construct

from blockrepl.block import Volume
from blockrepl.formats import nbd
from blockrepl.formats.nbd import HandshakeFlag, Info, Option, OptionReply, TransmissionFlag

MAX_OPTION_BYTES = 1 << 16  # more data than this is an attack: the session ends before anything is allocated for it
PREFERRED_BLOCK_BYTES = 4096

Exports = Callable[[], Mapping[str, Volume]]


class State(Enum):
    """Where a session stands."""

    FLAGS = auto()  # greeting sent
    OPTIONS = auto()
    TRANSMISSION = auto()
    CLOSED = auto()


class Event(Enum):
    """What the client's input amounted to."""

    FLAGS_ACCEPTED = auto()
    OPTION_ANSWERED = auto()
    EXPORT_CHOSEN = auto()
    ABORTED = auto()
    VIOLATED = auto()


TRANSITIONS = {
    (State.FLAGS, Event.FLAGS_ACCEPTED): State.OPTIONS,
    (State.FLAGS, Event.VIOLATED): State.CLOSED,
    (State.OPTIONS, Event.OPTION_ANSWERED): State.OPTIONS,
    (State.OPTIONS, Event.EXPORT_CHOSEN): State.TRANSMISSION,
    (State.OPTIONS, Event.ABORTED): State.CLOSED,
    (State.OPTIONS, Event.VIOLATED): State.CLOSED,
}

GREETING: bytes = nbd.greeting.build({"flags": HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES})


def transmission_flags(volume: Volume) -> int:
    """What we promise for a volume. A flush covers writes that completed on any connection: CAN_MULTI_CONN is true."""
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
    flags |= TransmissionFlag.CAN_MULTI_CONN
    if volume.writable:
        return flags | TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
    return flags | TransmissionFlag.READ_ONLY


class Handshake:
    """One session before transmission. Send `GREETING`, then feed `receive`.

    ``volume`` is set when ``state`` is TRANSMISSION; ``reason`` says why it is CLOSED.
    """

    def __init__(self, exports: Exports) -> None:
        self.state = State.FLAGS
        self.volume: Volume | None = None
        self.flags = 0  # the transmission flags that were promised
        self.reason = ""
        self._exports = exports
        self._no_zeroes = False

    def receive(self, view: memoryview) -> tuple[int, int, bytes]:
        """Consume complete messages: (bytes consumed, whole size of the incomplete one or 0, bytes to send).

        Stops consuming at TRANSMISSION and CLOSED. Raises nothing, whatever the input.
        """
        at = 0
        out = bytearray()
        while self.state in (State.FLAGS, State.OPTIONS):
            size = self._message_bytes(view[at:])
            if size == 0 or len(view) - at < size:
                return at, size, bytes(out)
            message = bytes(view[at : at + size])
            at += size
            event = self._take_flags(message) if self.state is State.FLAGS else self._take_option(message, out)
            self._move(event)
        return at, 0, bytes(out)

    def _move(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]

    def _message_bytes(self, view: memoryview) -> int:
        """Whole size of the next message; 0 when it cannot be known yet. Closes on one that is not acceptable."""
        if self.state is State.FLAGS:
            return int(nbd.client_flags.sizeof())
        if len(view) < nbd.option_header.sizeof():
            return 0
        try:
            header = nbd.option_header.parse(bytes(view[: nbd.option_header.sizeof()]))
        except construct.ConstructError:
            self._violate("bad magic in an option")
            return 0
        if header.length_bytes > MAX_OPTION_BYTES:
            self._violate(f"an option with {header.length_bytes} bytes of data")
            return 0
        return int(nbd.option_header.sizeof() + header.length_bytes)

    def _violate(self, reason: str) -> None:
        self.reason = reason
        self._move(Event.VIOLATED)

    def _take_flags(self, message: bytes) -> Event:
        flags = nbd.client_flags.parse(message).flags
        if flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
            self.reason = f"unknown client flags {flags:#x}"
            return Event.VIOLATED
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        return Event.FLAGS_ACCEPTED

    def _take_option(self, message: bytes, out: bytearray) -> Event:
        header_bytes = nbd.option_header.sizeof()
        option = nbd.option_header.parse(message[:header_bytes]).option
        data = message[header_bytes:]
        if option == Option.EXPORT_NAME:
            return self._export_name(data, out)
        if option in (Option.GO, Option.INFO):
            return self._info(option, data, out)
        if option == Option.ABORT:
            self.reason = "the client aborted"
            out += _reply(option, OptionReply.ACK)
            return Event.ABORTED
        if option == Option.LIST:
            self._list(data, out)
        else:
            out += _reply(option, OptionReply.ERR_UNSUP)
        return Event.OPTION_ANSWERED

    def _export_name(self, data: bytes, out: bytearray) -> Event:
        found = self._find(data)
        if found is None:
            self.reason = "no such export"
            return Event.VIOLATED  # this option has no way to say no
        self._choose(found[1])
        out += nbd.export_name_reply.build({"size_bytes": found[1].size_bytes, "flags": self.flags})
        if not self._no_zeroes:
            out += bytes(nbd.EXPORT_NAME_PADDING_BYTES)
        return Event.EXPORT_CHOSEN

    def _info(self, option: int, data: bytes, out: bytearray) -> Event:
        try:
            wanted = nbd.info_request.parse(data)
        except construct.ConstructError:
            wanted = None
        if wanted is None or len(nbd.info_request.build(wanted)) != len(data) or len(wanted.name) > nbd.MAX_NAME_BYTES:
            out += _reply(option, OptionReply.ERR_INVALID, b"malformed request for information")
            return Event.OPTION_ANSWERED
        found = self._find(wanted.name)
        if found is None:
            out += _reply(option, OptionReply.ERR_UNKNOWN, b"no such export")
            return Event.OPTION_ANSWERED
        name, volume = found
        self._choose(volume)
        info = {"size_bytes": volume.size_bytes, "flags": self.flags}
        out += _reply(option, OptionReply.INFO, nbd.info_export.build(info))
        if Info.NAME in wanted.requests:
            out += _reply(option, OptionReply.INFO, nbd.info_name.build({"name": name.encode()}))
        if Info.BLOCK_SIZE in wanted.requests:
            sizes = {
                "minimum_bytes": volume.block_size_bytes,
                "preferred_bytes": max(volume.block_size_bytes, PREFERRED_BLOCK_BYTES),
                "maximum_payload_bytes": min(nbd.MAX_PAYLOAD_BYTES, volume.max_write_bytes),
            }
            out += _reply(option, OptionReply.INFO, nbd.info_block_size.build(sizes))
        out += _reply(option, OptionReply.ACK)
        return Event.EXPORT_CHOSEN if option == Option.GO else Event.OPTION_ANSWERED

    def _list(self, data: bytes, out: bytearray) -> None:
        if data:
            out += _reply(Option.LIST, OptionReply.ERR_INVALID, b"LIST takes no data")
            return
        for name in self._exports():
            out += _reply(
                Option.LIST, OptionReply.SERVER, nbd.server_reply.build({"name": name.encode(), "description": b""})
            )
        out += _reply(Option.LIST, OptionReply.ACK)

    def _find(self, name: bytes) -> tuple[str, Volume] | None:
        """The export of that name; the empty name is the only export, if there is one only."""
        exports = self._exports()
        if not name:
            return next(iter(exports.items())) if len(exports) == 1 else None
        text = name.decode(errors="replace")
        volume = exports.get(text)
        return None if volume is None else (text, volume)

    def _choose(self, volume: Volume) -> None:
        self.volume = volume
        self.flags = transmission_flags(volume)


def _reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    built: bytes = nbd.option_reply.build({"option": option, "reply": reply, "data": data})
    return built
