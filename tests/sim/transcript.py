"""Conversations of a whole group as readable text: one line per message, in the order sent; heartbeats are left out."""

from __future__ import annotations

from random import Random
from typing import Any

from blockrepl.block import Op
from blockrepl.formats.link import DEFAULTS, HEADER_BYTES, Epoch, LinkRole, Message, Refusal, decode_body, decode_header
from blockrepl.formats.record import RecordKind, decode_batch, decode_record, iterate_entries
from tests.sim.group import Group, Options
from tests.sim.oracle import Write
from tests.sim.process import BLOCK, Process

# What says nothing about the conversation: sizes, what is the same in every message, what is drawn.
DULL = {"version", "version_min", "version_max", "features", "group", "nonce", "credit", "name", "incarnation"}


class Steady(Random):
    """No chance at all: every delay is a middling one, every choice the first."""

    def __init__(self) -> None:
        super().__init__(0)
        self._drawn = 0

    def random(self) -> float:
        return 0.5

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def randint(self, a: int, b: int) -> int:
        return a

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return 0 if stop is None else start

    def shuffle(self, x: Any) -> None:
        """As they are."""

    def getrandbits(self, k: int) -> int:
        self._drawn += 1
        return self._drawn

    def randbytes(self, n: int) -> bytes:
        return self.getrandbits(64).to_bytes(n, "big")


class Transcript:
    """A group without chance or faults, and what its processes say to each other."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.group = Group(0, Options(story="production", volumes=2, ring_bytes=1 << 20), Steady())
        self.group.world.on_message = self._message

    def note(self, text: str) -> None:
        """What happens next, for the reader."""
        self.lines.append(f"-- {text}")

    def quiet(self, seconds: float = 1.0) -> None:
        """Let them talk."""
        self.group.world.run(self.group.world.now_s + seconds)

    def write(self, volume: int) -> Write:
        """A host writes one block."""
        from tests.replication.roles import write

        group = self.group
        process = group.primary(group.layout.volumes[volume][0])
        batch = write(BLOCK)
        ours = Write(volume, list(batch.ops), [0], [BLOCK], [bytes(BLOCK)], group.oracle.completed)
        group.oracle.submitting[id(batch)] = ours

        def done(batch: Any) -> None:
            self.lines.append(f"-- {process.name} tells its host: {'EIO' if batch.errors else 'well'}")
            if batch.errors is None:
                group.oracle.complete(process, ours)

        batch.done = done

        def submit() -> None:
            process.volumes[volume].submit(batch)

        group.world.enter(process, submit)
        return ours

    def _message(self, process: Process, peer: str, data: bytes) -> None:
        view = memoryview(data)
        while view:
            head = decode_header(view)
            whole = view[: HEADER_BYTES + head.length_bytes]
            view = view[len(whole) :]
            if head.type != Message.HEARTBEAT:
                self.lines.append(
                    f"{process.name} → {peer}  {Message(head.type).name} {self._words(head, whole)}".rstrip()
                )

    def _words(self, head: Any, whole: memoryview) -> str:
        if head.type == Message.BATCH:
            record = decode_batch(whole[HEADER_BYTES:])
            return f"batch {record.batch}, {self._entries(record, whole)}"
        if head.type == Message.RECORD:
            record = decode_record(whole[HEADER_BYTES:])
            return (
                f"number {record.first} after {record.previous}, epoch {record.epoch}, {self._entries(record, whole)}"
            )
        fields = decode_body(head, whole)
        usual = DEFAULTS.get(head.type, {})
        told = [name for name in fields if name not in DULL and (name not in usual or fields[name] != usual[name])]
        return ", ".join(f"{name} {self._value(name, fields[name])}" for name in told)

    @staticmethod
    def _entries(record: Any, whole: memoryview) -> str:
        entries = iterate_entries(record, whole[HEADER_BYTES:])
        kind = RecordKind(record.kind).name.lower()
        return f"{kind} of " + ", ".join(
            f"{Op(op).name.lower()} {length} bytes at {offset} of volume {volume}"
            for volume, op, _, offset, length, _ in entries
        )

    @staticmethod
    def _value(name: str, value: Any) -> str:
        if isinstance(value, Epoch):
            return str(value.number)
        if name == "role":
            return LinkRole(value).name.lower()
        if name == "code":
            return Refusal(value).name
        return str(value).lower() if isinstance(value, bool) else str(value)
