"""A primary's half of a resync: bits in, blocks out, bits cleared at its end (PROTOCOL, rules 17, 19, 21)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Message, Pair, encode
from blockrepl.replication.actions import Action, Event, SaveBits, Send
from blockrepl.replication.comparing import block_bytes
from blockrepl.replication.copier import Copier
from blockrepl.replication.locks import COPIES, Purpose

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
        self._saving = False
        self.compare = False  # the group was formed anew: bits are a superset, and the old sources may have the same

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
        bitmap = self._owner.bitmaps.get(fields["volume"])
        if bitmap is None or fields["block_bytes"] != bitmap.block_bytes:
            raise ProtocolError(f"bits of volume {fields['volume']} in blocks of {fields['block_bytes']} bytes")
        try:
            bitmap.merge(fields["first_block"], fields["bits"])
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        return []

    def begin(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        """RESYNC: the bits before it are the intermediate's; join them with ours, durably, then copy."""
        self._pending = fields
        if fields["forget"]:
            for bitmap in self._owner.bitmaps.values():
                bitmap.clear()
        return self.proceed(now_s)

    def proceed(self, now_s: float) -> list[Action]:
        """When no solo write waits any more: make bits and P-VOLs durable."""
        owner = self._owner
        if self._pending is None or self._saving or len(owner.solo):
            return []
        self._saving = True

        def saved(now_s: float) -> list[Action]:
            return [owner.sync_volumes(synced)] if self._still() else self._given_up()

        def synced(now_s: float) -> list[Action]:
            return [owner.save_state(stored)] if self._prepare() else self._given_up()

        def stored(now_s: float) -> list[Action]:
            return self._go(now_s) if self._still() else self._given_up()

        return [SaveBits(owner.expect(saved))]

    def _still(self) -> bool:
        return self._pending is not None and bool(self._owner.link)

    def _given_up(self) -> list[Action]:
        """The link broke meanwhile: the next WELCOME brings it all again."""
        self._saving = False
        return []

    def _prepare(self) -> bool:
        """The P-VOLs are durable with everything written alone: from here on they follow the journal again."""
        owner, fields = self._owner, self._pending
        if fields is None or not owner.link:
            return False
        state = owner.state
        if state.resync != fields["id"]:
            state.cursor_volume = state.cursor_block = 0
        state.resync = fields["id"]
        if state.suspended:
            state.suspended, state.alone, state.trusted = 0, False, True
            # Not replayed: what the P-VOLs hold instead is marked, and copied.
            state.checkpoint = max(state.checkpoint, owner.acked, owner.welcomed_through)
        return True

    def _go(self, now_s: float) -> list[Action]:
        owner, state, fields = self._owner, self._owner.state, self._pending
        assert fields is not None
        self._pending, self._saving, self._told = None, False, False
        cursor = state.cursor_volume, state.cursor_block
        if self.copier is None or self.copier.resync != fields["id"]:
            self.copier = Copier(
                fields["id"], owner.bitmaps, verify=fields["verify"], rate_bytes=fields["rate_bytes"], cursor=cursor,
                now_s=now_s, compare=self.compare,
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
        actions = owner.read_ready() if len(owner.locks) else []
        if copier.done and not self._told:
            self._told = True
            message = encode(Message.COPIED, owner.state.epoch.number, id=copier.resync)
            actions += [Event(f"resync {copier.resync}: copied"), Send(owner.link, [message])]
        return actions

    def compared(self, fields: dict[str, Any], now_s: float) -> bool:
        """DIGESTED: whether it belongs to this resync."""
        copier = self.copier
        if copier is None or not copier.compares or not fields["blocks"]:
            return False
        volume, start, size = fields["volume"], fields["offset_bytes"], block_bytes(fields)
        return copier.compared(volume, start, fields["different"], size, here=fields["here"])

    def lost(self) -> None:
        """The link is gone."""
        self._pending, self._told = None, False
        if self.copier is None:
            return
        locks = self._owner.locks
        reading = locks.reading()
        copies = {(v, s) for purpose, v, s, _ in reading if purpose in COPIES}
        digests = {(v, s) for purpose, v, s, _ in reading if purpose is Purpose.DIGEST}
        for record in self._owner.queue:
            if record.copy is not None:
                copies.add(record.copy)
            if record.digest is not None:
                digests.add(record.digest)
        self.copier.interrupted(copies, digests)

    def stop(self) -> None:
        """The group is suspended again: all bits stay."""
        self.copier, self._pending, self._told = None, None, False

    def forget_old_bits(self) -> list[Action]:
        """Bits that a clean stop stored: once all of that is validated, they say nothing any more."""
        owner, state = self._owner, self._owner.state
        paired = owner.pair in (Pair.PAIR, Pair.PFUL) and owner.numbering
        if not paired or state.resync or self.under_way or owner.validated < owner.welcomed_through:
            return []
        if not any(bitmap.count for bitmap in owner.bitmaps.values()):
            return []
        for bitmap in owner.bitmaps.values():
            bitmap.clear()
        return [SaveBits(owner.expect(lambda _: []))]

    def ended(self, resync: int) -> list[Action]:
        """RESYNCED, or a WELCOME that says so: the bits may go, unless this primary was suspended since."""
        owner, state = self._owner, self._owner.state
        if not resync or resync != state.resync or state.suspended or owner.suspending:
            return []
        self.copier, self._told, self.compare = None, False, False
        for bitmap in owner.bitmaps.values():
            bitmap.clear()

        def cleared(now_s: float) -> list[Action]:
            if state.resync != resync or state.suspended or owner.suspending:
                return []
            state.resync = state.cursor_volume = state.cursor_block = 0
            return [Event(f"resync {resync} has ended"), owner.save_state(lambda _: [])]

        return [SaveBits(owner.expect(cleared))]
