"""A host of a primary for the tests of `replication`: performs actions against memory, and says in which order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blockrepl.bitmap import Bitmap
from blockrepl.block import WriteBatch
from blockrepl.formats.link import HEADER_BYTES, Message, Pair
from blockrepl.formats.record import RecordFlag, RecordKind, decode_batch, iterate_entries
from blockrepl.formats.state import PrimaryState
from blockrepl.replication.actions import (
    Action,
    Close,
    DigestBlocks,
    FailBatch,
    ReadBlocks,
    ReadMetadata,
    Reformed,
    SaveBits,
    SaveState,
    Send,
    StoreBatch,
    SyncVolumes,
)
from blockrepl.replication.policy import Policy
from blockrepl.replication.primary import Phase, Primary
from tests.replication.roles import FREE, GROUP, MID, NONCE, P1, S1, S2, messages, welcome, write

SIZE = 1 << 20
BLOCK = 64 << 10
NEVER = Policy(fence_never=True, lease_s=3.0, link_timeout_s=100.0, hold_s=1000.0, checkpoint_s=1e9)


class Host:
    """Performs a primary's actions against memory: what is durable, in which order things happened."""

    def __init__(self, policy: Policy = NEVER, *, clean: bool = True, alone_asked: bool = False, **state: Any) -> None:
        self.bitmaps = {1: Bitmap(SIZE, BLOCK), 2: Bitmap(SIZE, BLOCK)}
        self.role = Primary(
            group=GROUP, node=P1, name="p1", intermediate=MID, streams={1: S1, 2: S2},
            state=PrimaryState(**{"incarnation": 1, **state}), policy=policy, bitmaps=self.bitmaps, clean=clean,
            alone=alone_asked,
        )  # fmt: skip
        self.now_s = 0.0
        self.log: list[str] = []  # "bits", "state", "sync", "store", "fail", "send X"
        self.durable_bits = {volume: bytes(bitmap.bits) for volume, bitmap in self.bitmaps.items()}
        self.durable_state = replace(self.role.state)
        self.stored: list[WriteBatch] = []
        self.failed: list[WriteBatch] = []
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.batches: list[bytes] = []
        self.held: list[Action] = []
        self.holds: set[type] = set()
        self.link = 0
        self.metadata: dict[int, bytes] = {}

    def do(self, actions: list[Action]) -> None:
        queue = list(actions)
        while queue:
            action = queue.pop(0)
            if type(action) in self.holds:
                self.held.append(action)
                continue
            queue += self._perform(action)

    def _perform(self, action: Action) -> list[Action]:
        role, now_s = self.role, self.now_s
        if isinstance(action, SaveBits):
            self.log.append("bits")
            self.durable_bits = {volume: bytes(bitmap.bits) for volume, bitmap in self.bitmaps.items()}
            for bitmap in self.bitmaps.values():
                bitmap.changed.clear()
            return role.bits_saved(action.token, now_s)
        if isinstance(action, SaveState):
            self.log.append("state")
            self.durable_state = replace(role.state)
            return role.saved(action.token, now_s)
        if isinstance(action, SyncVolumes):
            self.log.append("sync")
            return role.volumes_synced(action.token, now_s)
        if isinstance(action, StoreBatch):
            if role.phase in (Phase.ALONE, Phase.ALONE_GREETING, Phase.JOINED):
                for offset, length in zip(action.batch.offsets, action.batch.lengths, strict=True):
                    durable = Bitmap(SIZE, BLOCK, self.durable_bits[action.volume])
                    assert durable.covers(offset, length), "a write reached the P-VOL before its bit the disk (rule 17)"
            self.log.append("store")
            self.stored.append(action.batch)
        elif isinstance(action, FailBatch):
            self.failed.append(action.batch)
        elif isinstance(action, ReadBlocks):
            self.log.append(f"read {action.volume} {action.offset_bytes} {action.length_bytes}")
            return role.blocks_read(action.token, b"\x07" * action.length_bytes, now_s)
        elif isinstance(action, ReadMetadata):
            return role.metadata_read(action.token, self.metadata.get(action.volume, b""), now_s)
        elif isinstance(action, DigestBlocks):
            count = -(-action.length_bytes // BLOCK)
            return role.digest_ready(action.token, BLOCK, [bytes(16)] * count, now_s)
        elif isinstance(action, Close):
            self.log.append("close")
            return role.lost(action.link, now_s)
        elif isinstance(action, Reformed):
            self.log.append("reformed")
        elif isinstance(action, Send):
            for _, kind, fields in messages([action]):
                self.sent.append((kind, fields))
                if kind == Message.BATCH:
                    self.batches.append(b"".join(bytes(each) for each in action.buffers)[HEADER_BYTES:])
        return []

    def let_go(self) -> None:
        """What was held back is performed now."""
        self.holds = set()
        held, self.held = self.held, []
        self.do(held)

    def lose(self) -> None:
        """The link breaks."""
        self.do(self.role.lost(self.link, self.now_s))

    def get(self, kind: Message, **fields: Any) -> None:
        """A message of the intermediate."""
        self.do(self.role.received(self.link, kind, fields, self.now_s))

    @property
    def phase(self) -> str:
        return self.role.phase.name

    def connect(self, **fields: Any) -> None:
        self.link += 1
        self.do(self.role.connected(self.link, NONCE, self.now_s))
        self.do(self.role.received(self.link, Message.WELCOME, welcome(**{"credit": FREE, **fields}), self.now_s))

    def start(self) -> None:
        self.connect()
        self.do(self.role.received(self.link, Message.REPLAYED, {"through": 0}, self.now_s))
        assert self.phase == "LIVE"

    def beat(self, stamp_ns: int, **fields: Any) -> None:
        usual = {"stamp_ns": stamp_ns, "echo_ns": 0, "numbered": 0, "validated": 0, "applied": 0, "credit": 0}
        self.do(self.role.received(self.link, Message.HEARTBEAT, {**usual, "pair": Pair.PAIR, **fields}, self.now_s))

    def tick(self, seconds: float) -> None:
        """Time passes, a second at most at a time."""
        while seconds > 1.0:
            self.stand_still(1.0)
            seconds -= 1.0
        self.stand_still(seconds)

    def stand_still(self, seconds: float) -> None:
        """Time passes, and this process does nothing."""
        self.now_s += seconds
        self.do(self.role.tick(self.now_s, int(self.now_s * 1e9)))

    def beat_free_s(self, seconds: float) -> None:
        """Time passes in small steps, with stamps only if there is a link."""
        for _ in range(int(seconds * 10) + 1):
            if self.role.link:
                self.beat(self.role._stamp_ns + 1, pair=self.role.pair)
            self.tick(0.1)

    def submit(self, volume: int = 1, offset: int = 0) -> WriteBatch:
        batch = write(4096, offset)
        self.do(self.role.submit(volume, batch, self.now_s))
        return batch

    def ack(self, batch: int, number: int) -> None:
        fields = {"incarnation": self.role.state.incarnation, "batch": batch, "number": number, "validated": 0}
        self.do(self.role.received(self.link, Message.ACK, {**fields, "credit": FREE}, self.now_s))

    def resync(self, resync: int = 50, **fields: Any) -> None:
        usual = {"id": resync, "verify": False, "rate_bytes": 0, "forget": False}
        self.do(self.role.received(self.link, Message.RESYNC, {**usual, **fields}, self.now_s))

    def said(self, kind: Message) -> list[dict[str, Any]]:
        return [fields for each, fields in self.sent if each == kind]

    def copies(self) -> list[tuple[int, int, int]]:
        """(volume, offset, length) of the COPY records sent."""
        found = []
        for raw in self.batches:
            head = decode_batch(memoryview(bytearray(raw)))
            if head.kind == RecordKind.UPDATE and head.flags & RecordFlag.COPY:
                found += [(v, offset, length) for v, _, _, offset, length, _ in iterate_entries(head, memoryview(raw))]
        return found


def alone() -> Host:
    host = Host()
    host.start()
    host.beat(1)
    host.do(host.role.lost(host.link, 0.0))
    host.tick(6.1)
    assert host.phase == "ALONE"
    return host
