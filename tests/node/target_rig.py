"""One target by itself: the real role, host, journal and undo file over disks that lose power; its intermediate is us.

The history is kept here, so that the images can be compared with any number of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from blockrepl.block import Op
from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Epoch, LinkRole, Message
from blockrepl.formats.record import RecordFlag, RecordKind, control_record, encode_record, number_record
from blockrepl.replication.policy import Policy
from blockrepl.replication.secondary import Phase
from tests.replication.roles import arrives, hello
from tests.sim.network import Network
from tests.sim.process import Layout, SecondaryProcess
from tests.sim.world import GROUP, World

SIZE_BYTES = 64 * 512
MID, S = 3, 4
OPENER = 90


@dataclass
class Sent:
    """A record of the history; its writes by (volume, offset, data)."""

    number: int
    record: bytes
    writes: list[tuple[int, int, bytes]] = field(default_factory=list)


class Rig:
    """A target, and the intermediate's side of the conversation with it."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.random = Random(seed ^ 0x5EED)
        policy = Policy(checkpoint_s=0.3, link_timeout_s=1e9, heartbeat_s=1e9)
        layout = Layout({"p1": 1}, ("i", MID), {"s1": S}, {1: ("p1", "s1", SIZE_BYTES), 2: ("p1", "s1", SIZE_BYTES)},
                        1 << 20, 1 << 20, policy)  # fmt: skip
        self.process = SecondaryProcess(self.world, Network(self.world), layout, "s1", S)
        self.process.format()
        start = self.process.start

        def watched() -> None:
            self.watch()
            start()

        self.process.start = watched  # type: ignore[method-assign]
        self.epoch = Epoch(1, b"1" * 16)
        self.history: list[Sent] = []
        self.number = 0
        self.link = 1
        self.splits: list[bool] = []
        self.said: list[int] = []  # types of what the target sent
        self.copy = self.copy_from = self.ended = 0  # as the intermediate has it
        self.all_validated = 0
        self.process.boot()
        self.act(lambda: self.store(OPENER, truncate=False, number=0, epoch=self.epoch))
        self.settle()
        self.connect()

    @property
    def role(self) -> Any:
        return self.process.host.role

    @property
    def last(self) -> int:
        """Of the stream."""
        return self.history[-1].number if self.history else 0

    def watch(self) -> None:
        """The node's hooks, of the process that runs now."""
        self.withdrawn = 0
        host = self.process.host
        host.on_split = self.splits.append

        def withdraw(done: Any) -> None:
            self.withdrawn += 1
            self.process.workers.later(done)

        host.on_withdraw = withdraw

        def send(link: int, buffers: Any, chunk: Any) -> None:
            self.said.extend(bytes(each)[4] for each in buffers)

        host.links.send = send  # type: ignore[method-assign]

    # life

    def act(self, what: Any) -> None:
        """Something happens in the process, if it lives."""
        if self.process.alive:
            self.world.enter(self.process, what)

    def settle(self, for_s: float = 2.0) -> None:
        """Let it come to rest."""
        self.world.run(self.world.now_s + for_s)

    def pause(self) -> None:
        """A moment, in which some of what is under way is done."""
        for _ in range(self.random.choice([0, 1, 3, 10, 40])):
            self.world.step()

    def crash(self, *, power: bool) -> None:
        """And start again, with the intermediate connected."""
        if power:
            self.process.cut_power()
            self.process.power_on()
        else:
            self.process.crash()
        self.revive()

    def revive(self) -> None:
        """Start it, if it died."""
        if not self.process.alive:
            self.process.boot()
            self.act(self.connect)

    def connect(self) -> None:
        """The intermediate greets, and sends what is missing."""
        self.link += 1
        if self.role.phase is not Phase.FOLLOWING:
            return
        fields = hello(LinkRole.INTERMEDIATE, MID, S, epoch=self.epoch, promised=self.epoch, incarnation=self.link)
        self.perform(self.role.accepted(self.link, fields, 0.0))
        held = self.role.received
        for sent in self.history:
            if sent.number > held:
                self.hand_over(sent)

    def perform(self, actions: list[Any]) -> None:
        self.process.host.perform(actions)
        self.process.host.settle()

    def message(self, kind: int, link: int = 0, **fields: Any) -> None:
        """A control message of the intermediate."""

        def arrive() -> None:
            self.perform(
                self.role.received_message(link or self.link, kind, arrives(kind, **fields), self.epoch.number, 0.0)
            )

        self.act(arrive)

    # records

    def hand_over(self, sent: Sent) -> None:
        """Its record arrives."""
        chunk = Chunk(len(sent.record), None)
        chunk.view[:] = sent.record
        self.process.host.record(self.link, self.epoch.number, chunk, 0, len(sent.record))
        chunk.release()
        self.process.host.settle()

    def send(self, record: bytearray, count: int, previous: int, writes: list[tuple[int, int, bytes]]) -> Sent:
        """Number and send a record."""
        number_record(record, 0, self.epoch.number, self.number + 1, previous, 1)
        self.number += count
        sent = Sent(self.number, bytes(record), writes)
        self.history.append(sent)
        self.act(lambda: self.hand_over(sent))
        return sent

    def write(self, flags: int = 0) -> Sent:
        """Some host's writes, or copied blocks."""
        random = self.random
        ops: list[int] = []
        offsets: list[int] = []
        lengths: list[int] = []
        payloads: list[bytes | None] = []
        writes: list[tuple[int, int, bytes]] = []
        volume = random.choice([1, 2])
        for _ in range(random.choice([1, 1, 3])):
            length = 512 * random.randint(1, 12)
            offset = 512 * random.randrange(0, (SIZE_BYTES - length) // 512 + 1)
            op = random.choice([Op.WRITE, Op.WRITE, Op.WRITE, Op.ZERO, Op.TRIM])
            data = random.randbytes(length) if op is Op.WRITE else None
            writes.append((volume, offset, data or bytes(length)))
            ops.append(int(op))
            offsets.append(offset)
            lengths.append(length)
            payloads.append(data)
        size = sum(len(data) for data in payloads if data)
        head, _ = encode_record(
            RecordKind.UPDATE, GROUP, 1, S, 1, 1, volume, ops, [0] * len(ops), offsets, lengths, payloads, size, flags
        )
        return self.send(head + b"".join(data for data in payloads if data), len(ops), self.last, writes)

    def start(self, at: int, *, initial: bool = False, skip: int = 0) -> Sent:
        """START, perhaps a jump over ``skip`` numbers that were never sent here."""
        flags = (int(RecordFlag.INITIAL) if initial else 0) | (int(RecordFlag.JUMP) if skip else 0)
        previous = self.last
        if skip:
            self.number += skip
            previous = self.number
        return self.send(control_record(RecordKind.START, GROUP, MID, S, 1, at, flags), 1, previous, [])

    def end(self, start: int) -> Sent:
        """END of the copy that began at ``start``."""
        return self.send(control_record(RecordKind.END, GROUP, MID, S, 1, start), 1, self.last, [])

    def prepare(self) -> None:
        self.message(Message.PREPARE, number=self.number, stream_last=self.last)

    def validate(self) -> None:
        """What the role has noted."""
        if self.process.alive:
            self.all_validated = max(self.all_validated, self.role.state.prepared)
            self.message(Message.VALIDATE, number=self.role.state.prepared)

    def validated(self) -> None:
        """Everything is prepared, validated and applied."""
        self.prepare()
        self.settle()
        self.validate()
        self.settle()
        assert self.role.applied == self.number

    # a takeover

    def store(self, link: int, *, truncate: bool, number: int, epoch: Epoch, **more: Any) -> None:
        role = self.role
        self.perform(role.accepted(link, hello(LinkRole.OPENER, S, S), 0.0))
        fields: dict[str, Any] = {"epoch": epoch, "dry_run": False, "marker": "", "reform": more.get("reform", False)}
        self.perform(role.received_message(link, Message.PROMISE, fields, 0, 0.0))
        stored = arrives(Message.STORE, promise=epoch, epoch=epoch, number=number, truncate=truncate, members=[S],
                         dry_run=False, **more)  # fmt: skip

        def store() -> None:
            self.perform(role.received_message(link, Message.STORE, stored, 0, 0.0))

        self.process.later(0.5, store)

    def agreed(self) -> int:
        """The number of a takeover, as its opener chooses it when this is the only secondary."""
        role = self.role
        held: int = role.held
        copy = role.copying.newest
        inside = copy is not None and held > copy.copy_from and not (copy.end and held >= copy.end)
        return copy.copy_from if inside else held

    def take_over(self, number: int | None = None) -> int:
        """Promise, store, activate, with crashes in between; returns the number."""
        self.settle()
        epoch = Epoch(self.epoch.number + 1, b"2" * 16)
        number = self.agreed() if number is None else number
        for turn in range(6):
            self.revive()
            self.act(lambda: self.store(OPENER, truncate=True, number=number, epoch=epoch))
            if turn < 3:
                self.world.run(self.world.now_s + self.random.choice([0.2, 0.5005, 0.502, 0.51, 0.6]))
                self.crash(power=self.random.random() < 0.7)
            else:
                self.settle()
            if self.role.phase is Phase.STORED:
                break
        assert self.role.phase is Phase.STORED, self.role.phase
        self.message(Message.ACTIVATE, link=OPENER, epoch=epoch, writable=True)
        self.settle()
        assert self.role.state.active
        return number

    # what must be

    def image(self, volume: int, number: int, base: bytes = bytes(SIZE_BYTES)) -> bytes:
        """What the history up to a number makes of a volume."""
        image = bytearray(base)
        for sent in self.history:
            if sent.number <= number:
                for at, offset, data in sent.writes:
                    if at == volume:
                        image[offset : offset + len(data)] = data
        return bytes(image)

    def history_ends_at(self, own: int, number: int) -> None:
        """A reform: numbers go on above ``number``, which stands for what was at ``own``."""
        self.history = [sent for sent in self.history if sent.number <= own]
        self.history.append(Sent(number, b""))
        self.number = number

    def resend(self, record: bytes, previous: int) -> None:
        """The record, as if it followed ``previous``."""
        again = bytearray(record)
        number_record(again, 0, self.epoch.number, previous + 1, previous, 1)
        self.hand_over(Sent(0, bytes(again)))

    def check_cache(self, number: int) -> None:
        """The images are those of a number, in the page cache at least."""
        for volume, found in self.images().items():
            assert found == self.image(volume, number), f"volume {volume} is not image({number})"

    def images(self) -> dict[int, bytes]:
        return {volume: bytes(self.process.machine.files[f"volume {volume}"].cache) for volume in (1, 2)}

    def check(self, number: int) -> None:
        """The images are those of a number, and durably."""
        for volume in (1, 2):
            file = self.process.machine.files[f"volume {volume}"]
            assert bytes(file.cache) == self.image(volume, number), f"volume {volume} is not image({number})"
            assert file.platter == file.cache, f"volume {volume} is not durable"


def raises(call: Any) -> str:
    """The words of the ProtocolError that ``call`` raises."""
    try:
        call()
    except ProtocolError as error:
        return str(error)
    return ""
