"""Planted bugs of connections, epochs and recovery; see `planted.py`."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from blockrepl.formats.link import Epoch
from blockrepl.formats.record import number_record
from blockrepl.replication.actions import Append, Close, SaveState, Send
from blockrepl.replication.checkpoints import Checkpoints
from blockrepl.replication.hop1 import Sender, Senders
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.opening import Opening
from blockrepl.replication.secondary import Secondary
from blockrepl.replication.secondary_epochs import Epochs
from blockrepl.replication.secondary_epochs import Phase as SecondaryPhase
from blockrepl.replication.streams import Streams
from blockrepl.storage.recovery import Found, _Ring
from tests.sim.group import Options
from tests.sim.planted import POWER, PRODUCTION, Planted, replaced
from tests.sim.process import Process

ATTEMPTS = Options(story="attempts", threads=12, fault_every_s=0.3)
SPLIT = Options(story="attempts", threads=12, fault_every_s=0.2, faults=("cut", "isolate", "cut one way", "kill"))
DUPLICATES = Options(story="production", threads=12, fault_every_s=0.3, faults=("slow disk",), duplicate=0.1)
RESTARTS = Options(story="production", threads=12, fault_every_s=0.2, faults=("late", "slow disk"))
FULL = Options(story="production", threads=12, ring_bytes=128 << 10, fault_every_s=0.3, faults=("slow disk", "cut"))


@contextlib.contextmanager
def all_of(*changes: AbstractContextManager[Any]) -> Any:
    """Several at once."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def duplicate_answered_from_memory() -> AbstractContextManager[Any]:
    """Rule 1: "duplicate, fine", before the first copy is durable."""
    original = Intermediate._number

    def number(self: Intermediate, sender: Sender, link: int, head: Any, *rest: Any) -> Any:
        if sender.live and head.incarnation == sender.incarnation and head.batch <= sender.batch:
            sender.durable_batch, sender.durable_last = sender.batch, sender.last
        return original(self, sender, link, head, *rest)

    return replaced(Intermediate, "_number", number)


def welcome_without_waiting() -> AbstractContextManager[Any]:
    """Rule 7: WELCOME names what is durable, and does not wait for what was numbered."""
    original, greeted = Intermediate._welcome, Intermediate._greet_primary

    def welcome(self: Intermediate, sender: Sender) -> Any:
        last, sender.last = sender.last, sender.durable_last
        try:
            return original(self, sender)
        finally:
            sender.last = last

    def greet(self: Intermediate, link: int, fields: Any, now_s: float) -> Any:
        """The incarnation is stored behind what was numbered, so waiting for that is waiting for this."""
        actions = greeted(self, link, fields, now_s)
        if actions and isinstance(actions[-1], SaveState):
            self._on_saved[actions[-1].token] = lambda _: []
            actions += self._ready_to_welcome(self.senders.by_node[fields["node"]], link, fields)
        return actions

    return all_of(replaced(Intermediate, "_welcome", welcome), replaced(Intermediate, "_greet_primary", greet))


def older_connection_not_killed() -> AbstractContextManager[Any]:
    """Rule 1: what a dead process sent is numbered though its successor has greeted."""
    attach, original = Senders.attach, Intermediate.batch
    older: dict[int, tuple[Sender, int]] = {}

    def keep(self: Senders, sender: Sender, link: int, hello: Any, now_s: float) -> None:
        older.update({number: (other, other.incarnation) for number, other in self.by_link.items() if other is sender})
        attach(self, sender, link, hello, now_s)

    def batch(self: Intermediate, link: int, head: Any, chunk: Any, start: int, end: int, *rest: Any) -> Any:
        found = older.get(link)
        if found is None or link in self.senders.by_link or self.opening.phase.value != "serving":
            return original(self, link, head, chunk, start, end, *rest)
        sender, stream = found[0], self.streams.by_node[head.stream]
        head.epoch, head.first, head.previous, head.time_ns = self.state.epoch.number, self.numbered + 1, stream.last, 0
        head.header_crc = number_record(chunk.view, start, head.epoch, head.first, head.previous, 0)
        self.numbered += head.count
        stream.last = sender.last = self.numbered
        self._appended.append((self.numbered, sender, -1, head.batch, head.stream, end - start))
        chunk.hold()
        return [Append(head, chunk.view[start:end], chunk)]

    close = Intermediate._greet_primary

    def greet(self: Intermediate, link: int, fields: Any, now_s: float) -> Any:
        sender = self.senders.by_node[fields["node"]]
        if sender.link:
            older[sender.link] = sender, sender.incarnation
        return [each for each in close(self, link, fields, now_s)
                if not (isinstance(each, Close) and each.reason == "the primary connected again")]  # fmt: skip

    return all_of(
        replaced(Senders, "attach", keep), replaced(Intermediate, "batch", batch),
        replaced(Intermediate, "_greet_primary", greet),
    )  # fmt: skip


def incarnations_without_order() -> AbstractContextManager[Any]:
    """Rule 1: a HELLO of a dead process, read late, takes the place of the living one."""
    original = Intermediate._greet_primary

    def greet(self: Intermediate, link: int, fields: Any, now_s: float) -> Any:
        sender = self.senders.by_node[fields["node"]]
        sender.incarnation = min(sender.incarnation, fields["incarnation"])
        return original(self, link, fields, now_s)

    return replaced(Intermediate, "_greet_primary", greet)


def header_without_the_last_batches() -> AbstractContextManager[Any]:
    """Rule 9: after a trim and a restart, the intermediate does not know what a primary sent last."""
    original = Intermediate.durable_state

    def state(self: Intermediate) -> Any:
        found = original(self)
        for row in found.primaries:
            row.batch = 0
        return found

    return replaced(Intermediate, "durable_state", state)


def cut_tail_is_not_erased() -> AbstractContextManager[Any]:
    """Rule 9: what lies beyond a torn tail stays there, and comes back behind what is appended."""

    def settle(self: Process, recovered: Any, file: Any) -> None:
        file.sync()

    expect = _Ring.expect

    def unchained(self: _Ring, check_body: Any) -> Any:
        """Frames name the one before them: that would tell too."""
        header, found, good = expect(self, check_body)
        if header is None or found is not Found.REMNANT:
            return header, found, good
        self._journal._chain = header.chain
        return expect(self, check_body)

    return all_of(replaced(Process, "settle_journal", settle), replaced(_Ring, "expect", unchained))


def checkpoint_number_taken_after_the_sync() -> AbstractContextManager[Any]:
    """Rule 4: what was stored while the P-VOLs were synced counts as synced."""
    original = Checkpoints._synced

    def synced(self: Checkpoints, number: int, then: Any) -> Any:
        return original(self, self._owner.acked, then)

    return replaced(Checkpoints, "_synced", synced)


def trim_ignores_validated() -> AbstractContextManager[Any]:
    """Rule 12: records go when their primary has them, whether or not the secondaries do."""
    return replaced(
        Intermediate, "releasable",
        property(lambda self: self.durable_number if self.senders.releasable is None else self.senders.releasable),
    )  # fmt: skip


def takeover_without_promise() -> AbstractContextManager[Any]:
    """Rule 23: a secondary reports what it holds and goes on taking records of the old epoch."""

    def promise(self: Epochs, link: int, fields: Any) -> Any:
        state = self._owner.state
        if fields["dry_run"] or state.active or fields["epoch"].number <= state.promised.number:
            return [Send(link, [self._promised("")])]
        self.machine.go("promise")
        state.promised = fields["epoch"]
        return [Send(link, [self._promised("")])]  # neither closed, nor synced, nor saved

    def phase(self: Secondary) -> SecondaryPhase:
        found = self.epochs.phase
        return SecondaryPhase.FOLLOWING if found is SecondaryPhase.PROMISED else found

    return all_of(replaced(Epochs, "promise", promise), replaced(Secondary, "phase", property(phase)))


def prepared_kept_across_an_epoch() -> AbstractContextManager[Any]:
    """Rule 23: what a secondary had prepared before a takeover discarded it."""
    original = Streams.restart

    def restart(self: Streams, epoch: int) -> None:
        kept = {stream.node: stream.prepared for stream in self.by_node.values()}
        original(self, epoch)
        for stream in self.by_node.values():
            stream.prepared = kept[stream.node]

    attach = Streams.attach

    def keep(self: Streams, node: int, link: int, credit: int, held: int, prepared: int) -> None:
        before = self.by_node[node].prepared
        self.by_node[node].prepared = 0
        confirmed, self.confirmed = self.confirmed, 0
        attach(self, node, link, credit, held, prepared)
        self.confirmed = confirmed
        self.by_node[node].prepared = max(before, prepared)

    return all_of(replaced(Streams, "restart", restart), replaced(Streams, "attach", keep))


def epoch_check_skipped() -> AbstractContextManager[Any]:
    """Rule 24: an intermediate goes on in its epoch, whatever the secondaries have promised or stored."""
    return all_of(
        replaced(Opening, "_learn", lambda self, stored, promised, **_: []),
        replaced(Opening, "_fits", lambda self, node: True),
    )


def a_truncation_forgets_the_epoch() -> AbstractContextManager[Any]:
    """Rule 23: a takeover discards records in one write and stores its epoch in another, later one."""
    original = Epochs._adopt

    def adopt(self: Epochs, link: int, fields: Any, last: int) -> None:
        state = self._owner.state
        epoch: Epoch = state.epoch
        original(self, link, fields, last)
        if fields["truncate"]:
            state.epoch, state.rolling = epoch, False

    return replaced(Epochs, "_adopt", adopt)


def credit_beyond_the_ring() -> AbstractContextManager[Any]:
    """Rule 6: the full ring is felt at the socket: nothing of a primary is read until there is room."""
    from blockrepl.node.intermediate_host import IntermediateHost
    from tests.sim.process import IntermediateProcess

    def grant(self: Senders, sender: Sender, *, whole: bool = False) -> bool:
        sender.credit = 1 << 60
        return False

    message = IntermediateProcess.message

    def read(self: IntermediateProcess, link: int, kind: int, fields: Any, epoch: int) -> Any:
        host: IntermediateHost = self.host
        if host._unfit and link in host.role.senders.by_link:
            self.later(0.02, lambda: read(self, link, kind, fields, epoch) if link in self.links else None)
        else:
            message(self, link, kind, fields, epoch)

    return all_of(replaced(Senders, "grant", grant), replaced(IntermediateProcess, "message", read))


PLANTED: list[tuple[Planted, Options]] = [
    (duplicate_answered_from_memory, DUPLICATES),
    (header_without_the_last_batches, POWER),
    (trim_ignores_validated, PRODUCTION),
    (epoch_check_skipped, SPLIT),
    (a_truncation_forgets_the_epoch, ATTEMPTS),
    (credit_beyond_the_ring, FULL),
    (welcome_without_waiting, RESTARTS),
    (older_connection_not_killed, RESTARTS),
    (incarnations_without_order, RESTARTS),
]
