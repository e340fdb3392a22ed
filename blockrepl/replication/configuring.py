"""A configuration takes effect at a number (PROTOCOL, rule 26): the intermediate's half.

Every node has made its files for it (and has said so) before its record is numbered, one in each stream.
Secondaries take it when they apply the record; primaries are told when it is validated, so that no takeover can fall
behind what hosts have seen. A record that a suspension may have kept from a secondary is numbered again, in PAIR; so it
is after a reform, for those who were not there.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from blockrepl.errors import UsageError
from blockrepl.formats.link import Message, Pair, encode
from blockrepl.formats.record import RecordKind
from blockrepl.replication.actions import Action, Event, Send, TakeConfig
from blockrepl.replication.hop1 import Sender
from blockrepl.replication.machine import Machine
from blockrepl.replication.opening import Phase

if TYPE_CHECKING:
    from blockrepl.replication.intermediate import Intermediate


class Step(Enum):
    """What is being done to the configuration."""

    SETTLED = "in effect"
    STORING = "being stored"
    OPEN = "to be numbered"
    NUMBERED = "waiting to be validated"
    CLOSING = "storing that it is in effect"


TABLE: dict[tuple[Step, str], Step] = {
    (Step.SETTLED, "asked"): Step.STORING,
    (Step.OPEN, "asked"): Step.STORING,
    (Step.STORING, "stored"): Step.OPEN,
    (Step.OPEN, "numbered"): Step.NUMBERED,
    (Step.NUMBERED, "suspended"): Step.OPEN,  # some secondary may never get the record
    (Step.NUMBERED, "validated"): Step.CLOSING,
    (Step.CLOSING, "stored"): Step.SETTLED,
}


class Configuring:
    """Invariant: primaries are told of a configuration only when every secondary holds its record, durably."""

    def __init__(self, owner: Intermediate) -> None:
        self._owner = owner
        state = owner.state
        begins = Step.SETTLED if state.configured or not state.config else Step.OPEN
        self.machine: Machine[Step] = Machine(TABLE, begins)

    @property
    def step(self) -> Step:
        """What is being done."""
        return self.machine.state

    def adopt(self, digest: int) -> None:
        """At start: what the group was made with, when the state names none yet."""
        state = self._owner.state
        if not state.config:
            state.config, state.configured = digest, True

    def unprepared(self, digest: int) -> list[int]:
        """Nodes that have not said yet that they have files for it."""
        owner = self._owner
        peers = [(each.node, each.config) for each in owner.senders.by_node.values()]
        peers += [(each.node, each.config) for each in owner.streams.by_node.values()]
        return [node for node, config in peers if config != digest]

    def configure(self, digest: int) -> list[Action]:
        """An operator asks for it. Nothing, when it is in effect or on its way. Raises UsageError."""
        owner, state = self._owner, self._owner.state
        if digest == state.config and self.step is not Step.OPEN:
            return []
        self.check()
        if unprepared := self.unprepared(digest):
            text = ", ".join(self._owner.called(node) for node in unprepared)
            raise UsageError(
                f"these nodes are not prepared for it yet: {text}", hint="run blockrepl adjust there first"
            )
        if not self.machine.may("asked"):
            raise UsageError(
                f"another configuration is {self.step.value}", hint="let it end: see blockrepl status"
            )  # fmt: skip
        self.machine.go("asked")
        state.config, state.configured = digest, False

        def stored(now_s: float) -> list[Action]:
            self.machine.go("stored")
            return self.tick(now_s)

        return [owner.save(stored)]

    def check(self) -> None:
        """Whether the group is in a state for it: PAIR, everybody there. Raises UsageError."""
        owner = self._owner
        owner.pairing.forbid("adjust", {Pair.PAIR, Pair.PFUL})
        if away := owner.pairing.missing():
            raise UsageError(f"adjust needs every node: {away}", hint="see: blockrepl status")
        if owner.state.excluded:
            text = f"adjust needs every node: {owner.called(owner.state.excluded[0])} is excluded"
            raise UsageError(text, hint="blockrepl node include, or blockrepl replace")

    @property
    def _in_pair(self) -> bool:
        state = self._owner.state
        return state.pair == Pair.PAIR and state.numbering and not (state.limited or state.start)

    def tick(self, now_s: float) -> list[Action]:
        """Time passes, or something was validated."""
        if self.machine.state is Step.SETTLED:
            return []
        owner = self._owner
        if self.step is Step.NUMBERED and not self._in_pair:
            self.machine.go("suspended")
        if owner.phase is not Phase.SERVING or not self._in_pair or owner.pairing.draining:
            return []
        if self.step is Step.OPEN and not self.unprepared(owner.state.config):
            return self._number()
        if self.step is Step.NUMBERED and owner.streams.validated >= owner.state.config_number:
            return self._close()
        return []

    def _number(self) -> list[Action]:
        owner, state = self._owner, self._owner.state
        self.machine.go("numbered")
        streams = owner.streams.by_node.values()
        records: list[Action] = [owner.control(RecordKind.CONFIG, each, state.config, 0) for each in streams]
        state.config_number = owner.numbered
        return [Event(f"configuration {state.config:016x} takes effect at {owner.numbered}"), *records]

    def _close(self) -> list[Action]:
        """Every secondary holds the record: from here on it is in effect, whatever happens."""
        owner, state = self._owner, self._owner.state
        self.machine.go("validated")
        state.configured = True

        def stored(now_s: float) -> list[Action]:
            self.machine.go("stored")
            told = [action for sender in owner.senders.by_node.values() if sender.live for action in self.tell(sender)]
            return [TakeConfig(state.config, state.config_number), *told]

        return [owner.save(stored)]

    def tell(self, sender: Sender) -> list[Action]:
        """A primary, now or when it is back: what is in effect."""
        state = self._owner.state
        if not state.config or not state.configured:
            return []
        message = encode(Message.CONFIG, state.epoch.number, digest=state.config, number=state.config_number)
        return [Send(sender.link, [message])]
