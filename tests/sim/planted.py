"""Planted bugs: what the simulator must find. Each is a context manager that breaks one rule of PROTOCOL.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

from blockrepl.formats.link import Message, bulk_header
from blockrepl.node.intermediate_host import IntermediateHost
from blockrepl.node.primary_host import PrimaryHost
from blockrepl.node.secondary_host import SecondaryHost
from blockrepl.replication.actions import Apply, Send, SyncJournal
from blockrepl.replication.hop1 import Senders
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.opening import Opening, Phase
from blockrepl.replication.primary import Primary
from blockrepl.replication.secondary import Secondary
from blockrepl.replication.streams import Streams
from tests.sim.disk import SimJournalFile
from tests.sim.group import Options
from tests.sim.process import IntermediateProcess, Process, SecondaryProcess

Planted = Callable[[], AbstractContextManager[Any]]
PRODUCTION = Options(story="production", fault_every_s=0.3)
POWER = Options(story="production", fault_every_s=0.25, faults=("power", "site"))
SLOW = Options(story="production", threads=12, fault_every_s=0.1, faults=("kill", "kill in mid-step", "slow disk"))
SLOW_KILLS = Options(story="production", threads=12, fault_every_s=0.1, faults=("kill", "power", "slow disk"))
SLOW_POWER = Options(story="production", threads=12, fault_every_s=0.12, faults=("power", "slow disk"))
PLANNED = Options(story="planned", threads=12, faults=())


def replaced(owner: Any, name: str, function: Any) -> AbstractContextManager[Any]:
    """One attribute, for a while."""
    return mock.patch.object(owner, name, function)


def acknowledge_before_durable() -> AbstractContextManager[Any]:
    """Rules 1 and 2: a batch is acknowledged when it is numbered."""
    original = Intermediate.batch

    def batch(self: Intermediate, link: int, *rest: Any) -> Any:
        actions = original(self, link, *rest)
        sender = self.senders.by_link.get(link)
        if sender is not None and sender.live and actions:
            sender.durable_batch, sender.durable_last = sender.batch, sender.last
            actions += self._acknowledge(sender)
        return actions

    return replaced(Intermediate, "batch", batch)


def _commit_without_sync(kind: type[Process]) -> AbstractContextManager[Any]:
    original = SimJournalFile.commit

    def commit(self: SimJournalFile) -> None:
        if not isinstance(self.process, kind):
            original(self)
            return
        for offset, buffers in self._writes:
            self.file.write(offset, b"".join(buffers))
        self._drop_writes()
        self._synced(self.journal.tail, None)

    return replaced(SimJournalFile, "commit", commit)


def journal_without_sync() -> AbstractContextManager[Any]:
    """Rule 2: the intermediate does not wait for its disk."""
    return _commit_without_sync(IntermediateProcess)


def prepared_before_the_sync() -> AbstractContextManager[Any]:
    """Rule 14: PREPARED when the note is written, not when it is durable."""
    return _commit_without_sync(SecondaryProcess)


def undurable_records_forwarded() -> AbstractContextManager[Any]:
    """Watermarks: a record goes to its secondary before it is durable."""
    original = IntermediateHost._append

    def append(self: IntermediateHost, action: Any) -> None:
        original(self, action)
        stream = self.role.streams.by_node[action.head.stream]
        if stream.ready and stream.sent == action.head.previous:
            record = bytes(action.record)
            self.links.send(stream.link, [bulk_header(Message.RECORD, action.head.epoch, len(record)), record], None)

    return replaced(IntermediateHost, "_append", append)


def validated_from_one_secondary() -> AbstractContextManager[Any]:
    """Rule 14: VALIDATE when the first has answered."""
    best = property(lambda self: max((stream.prepared for stream in self.by_node.values()), default=0))
    return replaced(Streams, "valid_counter", best)


def recovery_without_sync_at_the_intermediate() -> AbstractContextManager[Any]:
    """Rule 9: what kill -9 left in its page cache counts as durable."""

    def start(self: IntermediateProcess) -> None:
        self._open_links()  # before its incarnation is stored, which would sync the same file

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with replaced(IntermediateProcess, "settles", False), replaced(IntermediateProcess, "start", start):
            yield

    return both()


def recovery_without_sync_at_a_secondary() -> AbstractContextManager[Any]:
    """Rule 9: what kill -9 left in its page cache counts as durable."""
    return replaced(SecondaryProcess, "settles", False)


def serve_before_replay() -> AbstractContextManager[Any]:
    """Rule 7: a started primary serves at once."""
    return replaced(Primary, "serving", property(lambda self: True))


def drain_without_freeze() -> AbstractContextManager[Any]:
    """Rule 23: the intermediate drains for a takeover and numbers on."""

    def asked(self: Opening, link: int, fields: Any, now_s: float) -> Any:
        owner = self._owner
        if not fields["dry_run"]:
            owner.state.promised = self.higher = fields["epoch"]
        self.opener_waits = link
        return drained(self, now_s)

    def drained(self: Opening, now_s: float) -> Any:
        owner = self._owner
        if not self.opener_waits or self.phase is not Phase.SERVING or not owner.streams.drained(owner.durable_number):
            return []
        link, self.opener_waits = self.opener_waits, 0
        return [Send(link, [self._promised(owner.state.promised)])]

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with replaced(Opening, "asked_to_promise", asked), replaced(Opening, "drained", drained):
            yield

    return both()


def trim_ignores_checkpoint() -> AbstractContextManager[Any]:
    """Rule 12: the intermediate gives up records that no P-VOL holds durably."""
    return replaced(Senders, "releasable", property(lambda self: None))


def prepared_without_a_note() -> AbstractContextManager[Any]:
    """Rule 14: an idle secondary answers, and keeps nothing of what it promised."""

    def prepare(self: Secondary, link: int, number: int, stream_last: int) -> Any:
        if number <= self.state.prepared:
            return [self._prepared(link, number)]
        self.notes.append((number, link))
        epoch, received = self.state.epoch.number, self.received
        return [SyncJournal(self.later(lambda now_s: self.noted(number, epoch, now_s, received)))]

    return replaced(Secondary, "_prepare", prepare)


def apply_before_validate() -> AbstractContextManager[Any]:
    """Rule 14: what is prepared is applied at once."""
    original = Secondary.noted

    def noted(self: Secondary, number: int, epoch: int, now_s: float, received: int = 0) -> Any:
        actions = original(self, number, epoch, now_s, received)
        if actions:
            self.validated = max(self.validated, number)
            actions.append(Apply(number))
        return actions

    return replaced(Secondary, "noted", noted)


def fua_without_sync() -> AbstractContextManager[Any]:
    """Rule 4: FUA completes when the write is in the page cache."""
    original = PrimaryHost._store_batch

    def store(self: PrimaryHost, action: Any) -> None:
        action.batch.fua = False
        original(self, action)

    return replaced(PrimaryHost, "_store_batch", store)


def _no_sync_of_volumes(owner: Any, answer: str) -> AbstractContextManager[Any]:
    def sync(self: Any, action: Any) -> None:
        self.workers.later(partial(getattr(self, answer), action.token))

    return replaced(owner, "_sync_volumes", sync)


def checkpoint_before_the_sync() -> AbstractContextManager[Any]:
    """Rule 7: a checkpoint of what is in the page cache only."""
    return _no_sync_of_volumes(PrimaryHost, "_volumes_synced")


def frames_given_up_before_the_volume_is_durable() -> AbstractContextManager[Any]:
    """Rule 14: a secondary trims what its S-VOL may lose."""
    return _no_sync_of_volumes(SecondaryHost, "_done")


def notes_are_forgotten() -> AbstractContextManager[Any]:
    """Rule 14: a restarted secondary does not read its notes."""
    return replaced(Secondary, "recovered_note", lambda self, number, epoch: None)


def completed_at_submission() -> AbstractContextManager[Any]:
    """Rule 3: the host is told before anything is durable."""
    original = PrimaryHost.submit

    def submit(self: PrimaryHost, volume: int, batch: Any) -> None:
        original(self, volume, batch)
        done, batch.done = batch.done, lambda _: None
        done(batch)

    return replaced(PrimaryHost, "submit", submit)


def replay_from_memory_of_what_was_acknowledged() -> AbstractContextManager[Any]:
    """Rule 7: a primary takes what it had acknowledged for stored, and does not replay it after a power cut."""
    original = Primary.settled

    def settled(self: Primary, now_s: float) -> Any:
        self.state.checkpoint = max(self.state.checkpoint, self.acked)
        return original(self, now_s)

    original_ack = Primary.acknowledged

    def acknowledged(self: Primary, batch: int, number: int, now_s: float) -> Any:
        actions = original_ack(self, batch, number, now_s)
        self.state.checkpoint = max(self.state.checkpoint, number)
        return actions

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with replaced(Primary, "settled", settled), replaced(Primary, "acknowledged", acknowledged):
            yield

    return both()


PLANTED: list[tuple[Planted, Options]] = [
    (acknowledge_before_durable, POWER),
    (journal_without_sync, POWER),
    (prepared_before_the_sync, POWER),
    (undurable_records_forwarded, SLOW_POWER),
    (validated_from_one_secondary, PRODUCTION),
    (recovery_without_sync_at_the_intermediate, SLOW_KILLS),
    (recovery_without_sync_at_a_secondary, SLOW),
    (serve_before_replay, POWER),
    (drain_without_freeze, PLANNED),
    (trim_ignores_checkpoint, POWER),
    (prepared_without_a_note, POWER),
    (apply_before_validate, PRODUCTION),
    (fua_without_sync, PRODUCTION),
    (checkpoint_before_the_sync, POWER),
    (frames_given_up_before_the_volume_is_durable, POWER),
    (notes_are_forgotten, POWER),
    (completed_at_submission, PRODUCTION),
    (replay_from_memory_of_what_was_acknowledged, POWER),
]
