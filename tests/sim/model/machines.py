"""The machines of the model: a real role each, and the smallest host that can perform its actions.

A journal is a list of frames of which the first so many are durable; one sync and one save at a time are under way. A
volume holds, per block, the id of the write that is there. Time stands still: what a time-out would do is an event.
"""

from __future__ import annotations

from typing import Any

from blockrepl.block import Op, WriteBatch
from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import (
    BULK,
    HEADER_BYTES,
    Epoch,
    Message,
    bulk_header,
    decode_body,
    decode_header,
)
from blockrepl.formats.record import RecordHead, decode_batch, decode_record, iterate_entries
from blockrepl.formats.state import (
    IntermediateState,
    PrimaryState,
    SecondaryState,
    decode_intermediate,
    decode_primary,
    decode_secondary,
    encode_intermediate,
    encode_primary,
    encode_secondary,
)
from blockrepl.replication import copying, opening, pairing, primary, secondary_epochs, takeover
from blockrepl.replication.actions import Action
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.policy import Policy
from blockrepl.replication.primary import Primary
from blockrepl.replication.secondary import Secondary
from blockrepl.replication.takeover import Takeover

GROUP = bytes(range(16))
NODES = {"p1": 1, "p2": 2, "i": 3, "s1": 4, "s2": 5}
NAMES = {number: name for name, number in NODES.items()}
NEVER = float("inf")
BLOCK = 512
FREE = 1 << 30
ONE = Epoch(1, b"1" * 16)
VOLUMES = {1: ("p1", "s1"), 2: ("p2", "s2"), 3: ("p1", "s2")}  # volume → owner, secondary

POLICY = Policy(
    heartbeat_s=NEVER, link_timeout_s=NEVER, hold_s=NEVER, checkpoint_s=0.0, round_s=0.0, open_backoff_s=0.0,
)  # fmt: skip
CONSTANTS: dict[str, Any] = {
    "policy": POLICY, "primary table": primary.TABLE, "opening table": opening.TABLE,
    "secondary table": secondary_epochs.TABLE, "takeover table": takeover.TABLE, "copying table": copying.TABLE,
    "pairing table": pairing.TABLE,
}  # fmt: skip

Output = tuple[Any, ...]
"""("send", link, bytes), ("close", link, last words), ("told", write)"""


def nobody(_: WriteBatch) -> None:
    """A host's answer: the model sees `StoreBatch` instead."""


def write_of(entries: Any) -> int:
    """The id of the write in a record: its payload says it."""
    return int(bytes(entries[0][5])[0])


class Machine:
    """A machine and its process, if one runs."""

    name: str

    def __init__(self, name: str) -> None:
        self.name = name
        self.role: Any = None
        self.boots = 0
        self._out: list[Output] = []

    # events: each returns what the others see of it

    def step(self, event: tuple[Any, ...]) -> list[Output]:
        """One event: its name, then arguments."""
        self._out = []
        try:
            getattr(self, "on_" + event[0])(*event[1:])
        except ProtocolError:  # as hosts do: whose message does not fit is hung up on
            link = event[1]
            self._out.append(("close", link, b""))
            self.on_lost(link)
        out, self._out = self._out, []
        self.tidy()
        return out

    def local(self) -> list[tuple[Any, ...]]:
        """Events that need nobody else."""
        raise NotImplementedError

    def tidy(self) -> None:
        """Forget what tells equal states apart and has no meaning: used up tokens, words for people."""

    def perform(self, actions: list[Action]) -> None:
        """In order; what one brings about comes after the others."""
        queue = list(actions)
        while queue:
            action = queue.pop(0)
            queue += getattr(self, "do_" + type(action).__name__)(action) or []

    def do_Send(self, action: Any) -> None:  # noqa: N802
        self._out.append(("send", action.link, b"".join(action.buffers)))

    def do_Close(self, action: Any) -> Any:  # noqa: N802
        self._out.append(("close", action.link, bytes(action.last_words)))
        return self.role.lost(action.link, 0.0)

    def do_Event(self, action: Any) -> None:  # noqa: N802
        """Nobody listens."""

    def on_message(self, link: int, data: bytes) -> None:
        view = memoryview(data)
        head = decode_header(view)
        if head.type in BULK:
            chunk = Chunk(len(data) - HEADER_BYTES, None)
            chunk.view[:] = view[HEADER_BYTES:]
            self.bulk(link, head.epoch, chunk)
        else:
            self.perform(self.control(link, head.type, decode_body(head, view), head.epoch))

    def control(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> list[Action]:
        """A control message."""
        if kind == 1:
            found: list[Action] = self.role.accepted(link, fields, 0.0)
        else:
            found = self.role.received(link, kind, fields, 0.0)
        return found

    def bulk(self, link: int, epoch: int, chunk: Chunk) -> None:
        """A record."""
        raise NotImplementedError

    def on_lost(self, link: int) -> None:
        self.perform(self.role.lost(link, 0.0))

    def on_dialled(self, link: int, peer: str) -> None:
        nonce = b"n" * 16  # a WELCOME comes on the connection that its HELLO went out on, here
        self.perform(self.connected(link, peer, nonce))

    def connected(self, link: int, peer: str, nonce: bytes) -> list[Action]:
        """A connection that this machine asked for."""
        raise NotImplementedError

    def on_boot(self) -> None:
        raise NotImplementedError

    def crashes(self) -> list[tuple[Any, ...]]:
        """What a crash may leave: one event each. The first is kill -9 (all is left), the others power losses."""
        raise NotImplementedError


class PrimaryMachine(Machine):
    """A P-VOL of one block per volume, a state file."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.state = encode_primary(PrimaryState(epoch=ONE, promised=ONE))
        self.saving: tuple[bytes, int] | None = None  # state, token
        self.unsaved: list[tuple[bytes, int]] = []
        self.volume: dict[int, int] = {}  # volume → write, in the page cache
        self.platter: dict[int, int] = {}
        self.syncing: tuple[int, dict[int, int]] | None = None  # token, what it covers
        self.told: list[int] = []  # ghost: writes that hosts were told of
        self.submitted: list[int] = []

    def on_boot(self) -> None:
        state = decode_primary(self.state)
        state.incarnation += 1
        self.state = encode_primary(state)
        mine = {volume: NODES[s] for volume, (p, s) in VOLUMES.items() if p == self.name}
        self.role = Primary(group=GROUP, node=NODES[self.name], name=self.name, intermediate=NODES["i"], streams=mine,
                            state=state, policy=POLICY)  # fmt: skip

    def local(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        if self.saving:
            found.append(("saved",))
        if self.syncing:
            found.append(("synced",))
        if self.role.acked > self.role.state.checkpoint:
            found.append(("tick",))
        return found

    def connected(self, link: int, peer: str, nonce: bytes) -> list[Action]:
        return self.role.connected(link, nonce, 0.0)  # type: ignore[no-any-return]

    def on_tick(self) -> None:
        self.perform(self.role.tick(0.0, 0))

    def on_submit(self, write: int, volume: int) -> None:
        batch = WriteBatch(nobody)
        for column, value in ((batch.ops, Op.WRITE), (batch.offsets, 0), (batch.lengths, BLOCK), (batch.flags, 0),
                              (batch.cookies, write)):  # fmt: skip
            column.append(int(value))
        batch.payloads.append(memoryview(bytes([write]) * BLOCK))
        batch.size_bytes = BLOCK
        self.submitted.append(write)
        self.perform(self.role.submit(volume, batch, 0.0))

    def bulk(self, link: int, epoch: int, chunk: Chunk) -> None:
        self.perform(self.role.record(link, decode_record(chunk.view), chunk.view, 0.0))

    def do_StoreBatch(self, action: Any) -> None:  # noqa: N802
        write = action.batch.cookies[0]
        self.volume[action.volume] = write
        self.told.append(write)

    def do_StoreRecord(self, action: Any) -> None:  # noqa: N802
        for volume, _, _, _, _, payload in iterate_entries(action.head, action.record):
            self.volume[volume] = bytes(payload)[0] if payload is not None else 0

    def do_SyncVolumes(self, action: Any) -> None:  # noqa: N802
        assert self.syncing is None
        self.syncing = action.token, dict(self.volume)

    def on_synced(self) -> None:
        assert self.syncing is not None
        (token, covered), self.syncing = self.syncing, None
        self.platter = covered
        self.perform(self.role.volumes_synced(token, 0.0))

    def do_SaveState(self, action: Any) -> None:  # noqa: N802
        self.unsaved.append((encode_primary(self.role.state), action.token))
        self._save()

    def _save(self) -> None:
        if self.saving is None and self.unsaved:
            self.saving = self.unsaved.pop(0)

    def on_saved(self) -> None:
        assert self.saving is not None
        (self.state, token), self.saving = self.saving, None
        self.perform(self.role.saved(token, 0.0))
        self._save()

    def crashes(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for power in (0, 1):
            if power and self.volume == self.platter and not self.saving:
                continue  # as if it were killed, but for what is under way on links
            found += [("crash", power, saved) for saved in ((0, 1) if self.saving else (0,))]
        return found

    def on_crash(self, power: int, saved: int) -> None:
        if power:
            self.volume = dict(self.platter)
        if saved and self.saving:
            self.state = self.saving[0]
        self.role = self.saving = self.syncing = None
        self.unsaved = []
        self.platter = dict(self.platter)
        self.submitted = list(self.submitted)

    def tidy(self) -> None:
        role = self.role
        if role is not None:
            role.refusal = ""
            if not role._then:
                role._token = 0


class JournalMachine(Machine):
    """A journal in two parts, and a superblock."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.frames: list[tuple[str, Any]] = []
        self.durable = 0  # so many frames
        self.syncing = 0  # a sync of so many is under way; 0 for none
        self.superblock = b""
        self.saving: tuple[bytes, list[int], int] | None = None  # state, tokens, frames from here on go (-1: none)
        self.unsaved: list[tuple[list[int], int]] = []  # tokens, frames above

    def commit(self) -> None:
        """Sync what was appended, when no other sync is under way."""
        if not self.syncing and len(self.frames) > self.durable:
            self.syncing = len(self.frames)

    def encoded(self) -> bytes:
        """The role's state."""
        raise NotImplementedError

    def save(self, tokens: list[int], truncate: int = -1) -> None:
        """Write the superblock; one at a time."""
        self.unsaved.append((tokens, truncate))
        self._save()

    def _save(self) -> None:
        if self.saving is None and self.unsaved:
            tokens, truncate = self.unsaved.pop(0)
            while self.unsaved and truncate < 0 and self.unsaved[0][1] < 0:
                tokens = tokens + self.unsaved.pop(0)[0]
            self.saving = self.encoded(), tokens, truncate

    def on_saved(self) -> None:
        assert self.saving is not None
        (self.superblock, tokens, truncate), self.saving = self.saving, None
        if truncate >= 0:
            self.cut(truncate)
        for token in tokens:
            self.token_saved(token)
        self._save()
        self.commit()

    def cut(self, count: int) -> None:
        """Frames from ``count`` on are void."""
        self.frames = self.frames[:count]
        self.durable = min(self.durable, count)
        self.syncing = min(self.syncing, count) if min(self.syncing, count) > self.durable else 0

    def token_saved(self, token: int) -> None:
        """A save that the role asked for is durable."""
        raise NotImplementedError

    def on_synced(self) -> None:
        self.durable, self.syncing = self.syncing, 0
        self.became_durable()
        self.commit()

    def became_durable(self) -> None:
        """Tell the role."""
        raise NotImplementedError

    def crashes(self) -> list[tuple[Any, ...]]:
        saves = (0, 1) if self.saving else (0,)
        found = [("crash", len(self.frames), saved) for saved in saves]
        return found + [("crash", kept, saved) for kept in range(self.durable, len(self.frames)) for saved in saves]

    def on_crash(self, kept: int, saved: int) -> None:
        self.frames = self.frames[:kept]
        if saved and self.saving:
            self.superblock = self.saving[0]
            if self.saving[2] >= 0:
                self.frames = self.frames[: self.saving[2]]
        self.durable, self.syncing, self.saving = len(self.frames), 0, None
        self.unsaved, self.role = [], None
        self.crashed()

    def crashed(self) -> None:
        """What else is volatile."""


class IntermediateMachine(JournalMachine):
    """The real intermediate over a journal that is never trimmed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.superblock = encode_intermediate(IntermediateState(epoch=ONE, promised=ONE))
        self.heard = {4: 0, 5: 0}  # ghost: secondary → it has said that it holds all up to here, durably

    def on_boot(self) -> None:
        self.boots += 1
        state = decode_intermediate(self.superblock)
        state.incarnation += 1
        number = self.boots
        self.role = Intermediate(
            group=GROUP, node=NODES["i"], name="i", primaries=[1, 2], secondaries=[4, 5], state=state, policy=POLICY,
            new_id=lambda: bytes([number]) * 16,
        )  # fmt: skip
        for _, record in self.frames:
            self.role.recovered(decode_record(memoryview(record)))
        self.perform(self.role.ring(FREE))
        self.superblock = self.encoded()

    def encoded(self) -> bytes:
        return encode_intermediate(self.role.durable_state())

    def local(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        if self.syncing:
            found.append(("synced",))
        if self.saving:
            found.append(("saved",))
        phase = self.role.opening.phase
        if phase is opening.Phase.FROZEN:
            found.append(("backoff",))
        if phase is not opening.Phase.FROZEN or self.role.due_s() != NEVER:
            found.append(("tick",))
        return found

    def connected(self, link: int, peer: str, nonce: bytes) -> list[Action]:
        return self.role.connected(link, NODES[peer], nonce, 0.0)  # type: ignore[no-any-return]

    def on_tick(self) -> None:
        frozen = self.role.opening.phase is opening.Phase.FROZEN
        self.perform(self.role.round(0.0) if frozen else self.role.tick(0.0, 0))
        self.commit()

    def on_backoff(self) -> None:
        self.perform(self.role.tick(0.0, 0))
        self.commit()

    def on_message(self, link: int, data: bytes) -> None:
        super().on_message(link, data)
        self.commit()

    def control(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> list[Action]:
        node = self.role._hello_links.get(link)
        said = {Message.PREPARED: ("number",), Message.WELCOME: ("prepared", "validated"), Message.PROMISED: ("held",)}
        for name in said.get(Message(kind), ()) if node else ():
            self.heard[node] = max(self.heard[node], fields[name])
        return super().control(link, kind, fields, epoch)

    def bulk(self, link: int, epoch: int, chunk: Chunk) -> None:
        head = decode_batch(chunk.view)
        self.perform(self.role.batch(link, head, chunk, 0, len(chunk.view), 0.0, 0))

    def do_Append(self, action: Any) -> None:  # noqa: N802
        self.frames.append(("record", bytes(action.record)))

    def became_durable(self) -> None:
        last = decode_record(memoryview(self.frames[self.durable - 1][1])).last
        self.perform(self.role.durable(last, 0.0))

    def do_SaveState(self, action: Any) -> None:  # noqa: N802
        self.save([action.token])

    def token_saved(self, token: int) -> None:
        self.perform(self.role.saved(token, 0.0))

    def heads(self) -> list[tuple[RecordHead, bytes]]:
        """The records in the journal."""
        return [(decode_record(memoryview(record)), record) for _, record in self.frames]

    def do_Transmit(self, action: Any) -> Any:  # noqa: N802
        last, size = action.after, 0
        epoch = self.role.state.epoch.number
        for head, record in self.heads()[: self.durable]:
            if head.stream == action.node and action.after < head.last <= action.through:
                self._out.append(("send", action.link, intermediate_bulk(epoch, record)))
                last, size = head.last, size + 1
        return self.role.transmitted(action.node, action.link, last, size, 0.0)

    def do_Replay(self, action: Any) -> None:  # noqa: N802
        epoch = self.role.state.epoch.number
        for head, record in self.heads():
            if head.sender == action.sender and action.after < head.last <= action.through:
                self._out.append(("send", action.link, intermediate_bulk(epoch, record)))
        self._out.append(("send", action.link, action.end))

    def tidy(self) -> None:
        role = self.role
        if role is not None:
            role.opening.reason = ""
            if not role._on_saved:
                role._token = 0


def intermediate_bulk(epoch: int, record: bytes) -> bytes:
    """A RECORD message."""
    return bulk_header(Message.RECORD, epoch, len(record)) + record


class SecondaryMachine(JournalMachine):
    """The real secondary, its journal and its S-VOLs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.superblock = encode_secondary(SecondaryState(epoch=ONE, promised=ONE, members=[4, 5]))
        self.volume: dict[int, int] = {}
        self.platter: dict[int, int] = {}
        self.volumes: tuple[int, dict[int, int]] | None = None  # a sync of the S-VOLs: token, what it covers
        self.waiting: list[tuple[str, int, Any]] = []  # ("note" or "sync", frames that must be durable, the rest)
        self.truncating: list[tuple[int, int, int, int]] = []  # what a truncation answers

    def on_boot(self) -> None:
        self.role = role = Secondary(
            group=GROUP, node=NODES[self.name], name=self.name, intermediate=NODES["i"], peers=[4, 5],
            state=decode_secondary(self.superblock), policy=POLICY,
        )  # fmt: skip
        for kind, frame in self.frames:
            if kind == "note":
                role.recovered_note(*frame[:2])
        for kind, frame in self.frames:
            if kind == "record":
                assert role.recovered(decode_record(memoryview(frame))), "a truncation and its epoch are one write"
        role.free_bytes = FREE
        self.perform(role.start())
        self.commit()

    def encoded(self) -> bytes:
        return encode_secondary(self.role.durable_state())

    def local(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        if self.syncing:
            found.append(("synced",))
        if self.saving:
            found.append(("saved",))
        if self.volumes:
            found.append(("volumes",))
        elif self.role.applied > self.role.state.applied:
            found.append(("tick",))
        return found

    def on_tick(self) -> None:
        self.perform(self.role.tick(0.0, 0))
        self.commit()

    def control(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> list[Action]:
        if kind == 1:
            return self.role.accepted(link, fields, 0.0)  # type: ignore[no-any-return]
        return self.role.received_message(link, kind, fields, epoch, 0.0)  # type: ignore[no-any-return]

    def on_message(self, link: int, data: bytes) -> None:
        super().on_message(link, data)
        self.commit()

    def bulk(self, link: int, epoch: int, chunk: Chunk) -> None:
        self.perform(self.role.record(link, decode_record(chunk.view), epoch, chunk.view, chunk))

    def do_Append(self, action: Any) -> None:  # noqa: N802
        self.frames.append(("record", bytes(action.record)))

    def do_AppendNote(self, action: Any) -> None:  # noqa: N802
        self.frames.append(("note", (action.number, action.epoch)))
        self.waiting.append(("note", len(self.frames), (action.number, action.epoch, action.received)))

    def do_SyncJournal(self, action: Any) -> Any:  # noqa: N802
        if self.durable == len(self.frames):
            return self.role.done(action.token, 0.0)
        self.waiting.append(("sync", len(self.frames), action.token))
        return None

    def became_durable(self) -> None:
        ready = [each for each in self.waiting if each[1] <= self.durable]
        self.waiting = [each for each in self.waiting if each[1] > self.durable]
        notes = [each[2] for each in ready if each[0] == "note"]
        if notes:
            number, epoch, received = notes[-1]
            self.perform(self.role.noted(number, epoch, 0.0, received))
        for kind, _, token in ready:
            if kind == "sync":
                self.perform(self.role.done(token, 0.0))
        self._save_truncation()

    def do_SaveState(self, action: Any) -> None:  # noqa: N802
        self.save([action.token])

    def token_saved(self, token: int) -> None:
        if token < 0:  # a truncation
            answer = self.truncating.pop(0)
            self.perform(self.role.truncated(*answer, 0.0, 0, 0))
        else:
            self.perform(self.role.done(token, 0.0))

    def do_Truncate(self, action: Any) -> Any:  # noqa: N802
        heads = [decode_record(memoryview(frame)) for kind, frame in self.frames if kind == "record"]
        gone = [head for head in heads if head.last > action.number and head.last > self.role.applied]
        last = gone[0].previous if gone else self.role.received
        answer = action.token, sum(head.count for head in gone), 0, last
        if action.dry_run:
            return self.role.truncated(*answer, 0.0, 0, 0)
        count = 0
        for index, (kind, frame) in enumerate(self.frames):
            number = decode_record(memoryview(frame)).last if kind == "record" else frame[0]
            if number <= action.number:
                count = index + 1
        self.truncating.append(answer)
        self._truncate_at = count
        self._save_truncation()
        return None

    _truncate_at = -1

    def _save_truncation(self) -> None:
        """What stays must be durable first."""
        if 0 <= self._truncate_at <= self.durable:
            at, self._truncate_at = self._truncate_at, -1
            self.save([-1], at)
        else:
            self.commit()

    def do_Apply(self, action: Any) -> Any:  # noqa: N802
        for kind, frame in self.frames:
            if kind == "record":
                head = decode_record(memoryview(frame))
                if self.role.applied < head.last <= action.number:
                    for volume, _, _, _, _, payload in iterate_entries(head, memoryview(frame)):
                        self.volume[volume] = bytes(payload)[0] if payload is not None else 0
        return self.role.was_applied(action.number, 0.0)

    def do_SyncVolumes(self, action: Any) -> None:  # noqa: N802
        self.volumes = action.token, dict(self.volume)

    def on_volumes(self) -> None:
        assert self.volumes is not None
        (token, self.platter), self.volumes = self.volumes, None
        self.perform(self.role.done(token, 0.0))
        self.commit()

    def do_Publish(self, action: Any) -> None:  # noqa: N802
        """No host uses the S-VOLs."""

    def crashed(self) -> None:
        self.waiting, self.truncating, self.volumes, self._truncate_at = [], [], None, -1

    def crashes(self) -> list[tuple[Any, ...]]:
        found = super().crashes()
        if self.volume != self.platter:
            found.append(("crash_volumes", *found[-1][1:]))
        return found

    def on_crash_volumes(self, kept: int, saved: int) -> None:
        """Power is lost: what the S-VOLs held in the page cache too."""
        self.volume = dict(self.platter)
        self.on_crash(kept, saved)

    def tidy(self) -> None:
        role = self.role
        if role is not None:
            role.reason = ""
            if not (role._then or role.epochs._truncating or role.copying._waiting or self.waiting or self.unsaved):
                role._token = 0


class OpenerMachine(Machine):
    """A takeover, which runs on s1's machine."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.done_at = -1  # ghost: the number of a drained takeover that is done

    def step(self, event: tuple[Any, ...]) -> list[Output]:
        out = super().step(event)
        if self.role is not None and self.role.phase is takeover.Phase.DONE and self.role.report.drained:
            self.done_at = self.role.report.number
        return out

    def on_boot(self) -> None:
        self.role = Takeover(
            group=GROUP, node=NODES["s1"], name="s1", intermediate=NODES["i"], secondaries=[4, 5], names=NAMES,
            new_id=lambda: b"o" * 16, now_s=0.0, patience_s=NEVER,
        )  # fmt: skip

    def local(self) -> list[tuple[Any, ...]]:
        return []

    def connected(self, link: int, peer: str, nonce: bytes) -> list[Action]:
        return self.role.connected(link, NODES[peer], nonce)  # type: ignore[no-any-return]

    def control(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> list[Action]:
        return self.role.received(link, kind, fields, 0.0)  # type: ignore[no-any-return]

    def on_unreachable(self, peer: str) -> None:
        self.perform(self.role.unreachable(NODES[peer], "no answer", 0.0))

    def on_deadline(self) -> None:
        """Its patience is at an end."""
        self.perform(self.role.tick(NEVER))

    def on_crash(self) -> None:
        self.role = None

    def crashes(self) -> list[tuple[Any, ...]]:
        return [("crash",)]
