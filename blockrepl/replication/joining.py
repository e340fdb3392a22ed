"""How a primary joins its group: HELLO, WELCOME, and the replay that a started one needs (PROTOCOL, rules 1, 7, 24)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Epoch, LinkRole, Message, encode
from blockrepl.formats.record import RecordHead, RecordKind, iterate_entries
from blockrepl.replication.actions import Action, Close, Event, Send, StoreRecord
from blockrepl.replication.greeting import Introduction

if TYPE_CHECKING:
    from blockrepl.replication.primary import Primary


class Joining:
    """From a connection to the intermediate to being one of the group.

    Invariant: what WELCOME says counts only when its epoch is stored.
    """

    def __init__(self, owner: Primary, name: str) -> None:
        self._owner = owner
        self._me = Introduction(owner.group, owner.node, name, LinkRole.PRIMARY)
        self._nonce = b""
        self._welcome: dict[str, Any] = {}
        self._replayed = 0

    @property
    def through(self) -> int:
        """Everything of this primary that was numbered before the newest WELCOME is at or below it."""
        return int(self._welcome.get("through", 0))

    @property
    def batch(self) -> int:
        """The last batch of this incarnation that the newest WELCOME knew."""
        return int(self._welcome.get("batch", 0))

    def hello(self, link: int, nonce: bytes) -> list[Action]:
        """Greet on a new link."""
        owner, state = self._owner, self._owner.state
        self._nonce, self._welcome = nonce, {}
        hello = self._me.hello(
            owner.intermediate, nonce, epoch=state.epoch, promised=state.promised, incarnation=state.incarnation,
            highest=owner.acked, checkpoint=owner.checkpoints.told, fresh=not owner.serving,
            suspended=bool(state.suspended), trusted=state.trusted, direction=state.direction,
        )  # fmt: skip
        return [Send(link, [hello])]

    def refused(self, fields: dict[str, Any]) -> list[Action]:
        """REFUSED: whatever for, a higher epoch that it names is remembered (rule 24)."""
        owner, state = self._owner, self._owner.state
        owner.refusal = fields["text"]
        if self._is_another(fields["epoch"]):
            return self._part(fields["epoch"])
        actions: list[Action] = [Event(f"the intermediate refused: {fields['text']}", {"code": fields["code"]})]
        higher: Epoch = max(fields["epoch"], fields["promised"])
        if higher.number > state.promised.number:
            state.promised = higher
            actions.append(owner.save_state(lambda _: []))
        return [*actions, Close(owner.link, "refused")]

    def _is_another(self, epoch: Epoch) -> bool:
        """Whether it is our epoch by its number and not by its id: the group was opened twice (rule 22)."""
        ours = self._owner.state.epoch
        return bool(ours.number) and epoch.number == ours.number and epoch.id != ours.id

    def _part(self, epoch: Epoch) -> list[Action]:
        """Split brain: whatever this process went on with would be a third history. It completes nothing any more."""
        owner = self._owner
        owner.parted = f"split brain: epoch {epoch} at the intermediate, {owner.state.epoch} here"
        return [Event(owner.parted), Close(owner.link, owner.parted)]

    def welcome(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        """WELCOME. Raises ProtocolError when it does not fit."""
        owner, state = self._owner, self._owner.state
        if not owner.machine.may("welcome") or self._welcome:
            raise ProtocolError("WELCOME was not asked for")
        if fields["nonce"] != self._nonce:
            raise ProtocolError("WELCOME answers another HELLO")
        if fields["role"] != LinkRole.INTERMEDIATE or fields["node"] != owner.intermediate:
            raise ProtocolError(f"node {fields['node']} is not the intermediate")
        known = max(state.epoch.number, state.promised.number)
        epoch: Epoch = fields["epoch"]
        if self._is_another(epoch):
            return self._part(epoch)
        if epoch.number < known:
            raise ProtocolError(f"WELCOME of epoch {epoch.number}, but epoch {known} exists")
        if fields["through"] < state.checkpoint and not state.suspended:
            raise ProtocolError("the intermediate holds less than this primary's checkpoint")
        self._welcome = fields
        owner.refusal = owner.parted = ""
        if epoch == state.epoch:
            return self._enter(now_s)
        state.epoch, state.promised = epoch, max(state.promised, epoch)
        link = owner.link
        return [owner.save_state(lambda now_s: self._enter(now_s) if owner.link == link else [])]

    def _enter(self, now_s: float) -> list[Action]:
        """The epoch is stored: replay, or send on where the intermediate is."""
        owner, welcome = self._owner, self._welcome
        owner.machine.go("welcome")
        owner.welcomed(welcome, now_s)
        if owner.replaying:
            after = owner.state.checkpoint
            self._replayed = after
            return [Send(owner.link, [encode(Message.REPLAY, owner.state.epoch.number, after=after)])]
        if owner.suspended:  # what it sent before is not the journal's any more
            told = Event("joined; suspended: a resync is the way back")
            return [told, *owner.suspension.complete_waiting(), *owner.resyncing.proceed(now_s)]
        # What was sent on the older connection is in `unsent` again; what of it is durable counts as acknowledged.
        owner.catch_up(welcome["batch"])
        actions = owner.acknowledged(welcome["batch"], welcome["through"], now_s)
        # One that was stored after our HELLO went out; an idle primary would never tell it otherwise.
        return [*actions, *owner.checkpoints.tell(), *self.joined(now_s)]

    def joined(self, now_s: float) -> list[Action]:
        """It is live: what WELCOME says beyond that."""
        owner = self._owner
        if not owner.numbering and owner.policy.fence_never:
            return owner.suspension.told(self.through)
        ended = owner.resyncing.ended(self._welcome["resynced"])
        return [*owner.send_more(), *ended, *owner.resyncing.proceed(now_s)]

    # replay

    def record(self, head: RecordHead, record: memoryview) -> list[Action]:
        """A record of this primary's own comes back while replaying. Raises ProtocolError."""
        owner = self._owner
        if not owner.replaying or head.sender != owner.node or head.first <= self._replayed:
            raise ProtocolError(f"record {head.first} was not asked for")
        self._replayed = head.last
        if head.kind != RecordKind.UPDATE:
            return []
        for volume, _, _, offset, length, _ in iterate_entries(head, record):
            owner.unconfirmed.add(head.last, volume, [offset], [length])
        return [StoreRecord(head, record)]

    def replayed(self, fields: dict[str, Any]) -> list[Action]:
        """REPLAYED: that was all. Raises ProtocolError."""
        owner = self._owner
        if not owner.replaying or fields["through"] != self.through:
            raise ProtocolError("REPLAYED does not fit WELCOME")
        owner.machine.go("replayed")
        owner.acked = fields["through"]
        return owner.checkpoints.settle()
