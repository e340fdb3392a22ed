"""A primary's half of a resync: bits in, blocks out, bits cleared at its end (PROTOCOL, rules 17, 19, 21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blockrepl.bitmap import Bitmap
from blockrepl.formats.link import Message, Pair, encode
from blockrepl.replication.actions import Action, Event, Send
from blockrepl.replication.bits import merge_bits
from blockrepl.replication.comparing import block_bytes
from blockrepl.replication.copier import Copier
from blockrepl.replication.locks import COPIES, Purpose
from blockrepl.replication.pending import PendingRecord

if TYPE_CHECKING:
    from blockrepl.replication.primary import Primary


class Resyncing:
    """The resync that a primary works on, if any.

    Invariant: bits are cleared only for a resync whose end was validated, and only if nothing was suspended since.
    """

    def __init__(self, owner: Primary) -> None:
        self._owner = owner
        self.copier: Copier | None = None
        self._told = False  # COPIED went out on this link
        self._pending: dict[str, Any] | None = None  # RESYNC that waits for solo writes and for bits
        self._preparing: dict[str, Any] | None = None  # the one that bits and P-VOLs are being stored for
        self._answers_after = 0  # what was compared at this number or before answers an older copier
        self.compare = False  # the group was formed anew: bits are a superset, and the old sources may have the same
        self._merged = False  # BITMAPs came, and their RESYNC has not

    @property
    def under_way(self) -> bool:
        """There is something to copy, or to wait for."""
        return self.copier is not None or self._pending is not None

    @property
    def begins(self) -> bool:
        """A RESYNC came, and is being made ready for: writes are for the journal from now on."""
        return self._pending is not None

    # what the intermediate says

    def bits(self, fields: dict[str, Any]) -> list[Action]:
        """BITMAP: what hop 2 missed. Raises ProtocolError."""
        merge_bits(self._owner.bitmaps, fields)
        self._merged = True
        return []

    def begin(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        """RESYNC: the bits before it are the intermediate's; join them with ours, durably, then copy."""
        self._pending, self._merged = fields, False
        return self.proceed(now_s)

    def proceed(self, now_s: float) -> list[Action]:
        """When it is welcomed, and no solo write waits any more: make bits, P-VOLs and the state durable, in turn.

        Whatever is not for the newest RESYNC on the present link begins again: it may cover too little.
        """
        owner, fields = self._owner, self._pending
        if fields is None or self._preparing is not None or not owner.joined or len(owner.solo):
            return []
        if owner.machine.may("resync"):
            owner.machine.go("resync")
        self._preparing = fields

        def still(then: Callable[[float], list[Action]]) -> Callable[[float], list[Action]]:
            def step(now_s: float) -> list[Action]:
                if self._pending is fields:
                    return then(now_s)
                if self._preparing is fields:
                    self._preparing = None
                return self.proceed(now_s)

            return step

        def saved(now_s: float) -> list[Action]:
            return [owner.sync_volumes(still(synced))]

        def synced(now_s: float) -> list[Action]:
            self._follow_the_journal(fields["id"])
            return [owner.save_state(still(stored))]

        def stored(now_s: float) -> list[Action]:
            self._pending = self._preparing = None
            return self._go(fields, now_s)

        return [owner.save_bits(still(saved))]

    def _follow_the_journal(self, resync: int) -> None:
        """The P-VOLs are durable with everything written alone: from here on they follow the journal again."""
        owner, state = self._owner, self._owner.state
        if state.resync != resync:
            state.cursor_volume = state.cursor_block = 0
        state.resync = resync
        if state.suspended:
            state.suspended, state.alone = 0, False
            # Nothing of before is replayed: what the P-VOLs hold instead is marked, and copied.
            state.checkpoint = owner.acked = owner.joining.through

    def _go(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        owner, state = self._owner, self._owner.state
        self._told = False
        if self.copier is None or self.copier.resync != fields["id"]:
            bitmaps = owner.bitmaps
            # An older resync's answer knows nothing of what was taken alone, or jumped over, since.
            self._answers_after = max(fields["id"], owner.joining.through)
            if fields["forget"]:
                bitmaps = {volume: Bitmap(each.size_bytes, each.block_bytes) for volume, each in bitmaps.items()}
            self.copier = Copier(
                fields["id"], bitmaps, verify=fields["verify"], rate_bytes=fields["rate_bytes"],
                cursor=(state.cursor_volume, state.cursor_block), now_s=now_s, compare=self.compare,
            )  # fmt: skip
        what = "compare" if self.copier.compares else "copy"
        text = f"resync {fields['id']}: {self.copier.total_bytes} bytes to {what}"
        return [Event(text), *owner.numbered_again(now_s), *self.copy_more(now_s)]

    # copying

    def copy_more(self, now_s: float) -> list[Action]:
        """Lock and read as much as the window and the rate allow; at the end say so."""
        copier, owner = self.copier, self._owner
        if copier is None or self._pending is not None or not owner.live:
            return []
        copier.ask_again(now_s)
        while (volume := copier.next_metadata()) is not None:
            owner.locks.lock(owner.next_token(), Purpose.METADATA, volume, 0, 1)
        while owner.queue.size_bytes < owner.policy.pending_bytes:
            found = copier.next_copy(now_s)
            if found is None:
                break
            purpose = Purpose.COPY_HERE if copier.is_here(*found[:2]) else Purpose.COPY
            owner.locks.lock(owner.next_token(), purpose, *found)
        while (found := copier.next_digest(now_s)) is not None:
            owner.locks.lock(owner.next_token(), Purpose.DIGEST, *found)
        actions = owner.reading.ready() if len(owner.locks) else []
        if copier.done and not self._told:
            self._told = True
            message = encode(Message.COPIED, owner.state.epoch.number, id=copier.resync)
            actions += [Event(f"resync {copier.resync}: copied"), Send(owner.link, [message])]
        return actions

    def acknowledged(self, record: PendingRecord, now_s: float) -> None:
        """A record of the copier's is durable in the journal."""
        if self.copier is None:
            return
        if record.copy is not None:
            self.copier.acknowledged(*record.copy)
        elif record.metadata is not None:
            self.copier.metadata_done(record.metadata)
        elif record.digest is not None:
            self.copier.asked(*record.digest, now_s)

    def compared(self, fields: dict[str, Any]) -> bool:
        """DIGESTED: whether it belongs to this resync."""
        copier = self.copier
        if copier is None or not copier.compares or not fields["blocks"] or fields["number"] <= self._answers_after:
            return False
        volume, start, size = fields["volume"], fields["offset_bytes"], block_bytes(fields)
        return copier.compared(volume, start, fields["different"], size, here=fields["here"])

    def lost(self) -> None:
        """The link is gone."""
        self._pending, self._told, self._merged = None, False, False
        if self.copier is None:
            return
        reading = self._owner.locks.reading()
        copies = {(v, s) for purpose, v, s, _ in reading if purpose in COPIES}
        digests = {(v, s) for purpose, v, s, _ in reading if purpose is Purpose.DIGEST}
        for record in self._owner.queue:
            if record.copy is not None:
                copies.add(record.copy)
            if record.digest is not None:
                digests.add(record.digest)
        self.copier.interrupted(copies, digests)

    def remember_cursor(self) -> None:
        """The state is about to be stored: where to go on after a restart."""
        if self.copier is not None:
            state = self._owner.state
            state.cursor_volume, state.cursor_block = self.copier.cursor

    def stop(self) -> None:
        """The group is suspended again: all bits stay. Another resync begins with a RESYNC of its own."""
        self.copier, self._pending, self._told = None, None, False

    def begin_anew(self) -> None:
        """Nothing more is heard of what was being made ready for."""
        self.stop()
        self._preparing = None

    def forget_old_bits(self) -> list[Action]:
        """Bits that a clean stop stored: once all of that is validated, they say nothing any more."""
        owner = self._owner
        paired = owner.pair in (Pair.PAIR, Pair.PFUL) and owner.numbering
        if not paired or owner.copying or self._merged or owner.validated < owner.joining.through:
            return []
        if not any(bitmap.count for bitmap in owner.bitmaps.values()):
            return []
        for bitmap in owner.bitmaps.values():
            bitmap.clear()
        return [owner.save_bits(lambda _: [])]

    def ended(self, resync: int) -> list[Action]:
        """RESYNCED, or a WELCOME that says so: the bits may go, unless this primary was suspended since."""
        owner, state = self._owner, self._owner.state
        if not resync or resync != state.resync or state.suspended or owner.suspending or self._pending is not None:
            return []
        self.copier, self._told, self.compare = None, False, False
        for bitmap in owner.bitmaps.values():
            bitmap.clear()

        def cleared(now_s: float) -> list[Action]:
            state.resync = state.cursor_volume = state.cursor_block = 0
            state.trusted = True
            owner.know_all()
            return [Event(f"resync {resync} has ended"), owner.save_state(lambda _: [])]

        return [owner.save_bits(cleared)]
