"""Which roles a data node has when it starts, from what is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from blockrepl.definition import Definition, load
from blockrepl.errors import StorageError, UsageError
from blockrepl.formats.link import Epoch, Message, Pair
from blockrepl.formats.state import PrimaryState, SecondaryState, encode_primary, encode_secondary
from blockrepl.node.create import create, journal_identity, state_identity
from blockrepl.node.data_node import DataNode
from blockrepl.node.reform_run import question
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.slot_file import SlotFile
from tests.system.group import RealGroup

OLD, NEW = Epoch(4, b"o" * 16), Epoch(5, b"n" * 16)


@pytest.fixture
def definition(tmp_path: Path) -> Definition:
    sizes = dict.fromkeys(("data", "log", "index"), "1MiB")
    group = RealGroup(tmp_path, journal="16MiB", secondary_journal="16MiB", sizes=sizes)
    return load(group.path)


def opened(
    definition: Definition, name: str, secondary: SecondaryState | None, primary: PrimaryState,
    then: Callable[[DataNode], None] = lambda _: None,
) -> DataNode:  # fmt: skip
    """The node, its files made with these states; ``then`` is done to it."""
    node = definition.node(name)
    create(definition, node)
    if secondary is not None:
        (node.directory / "journal").unlink()
        JournalFile.create(
            node.directory / "journal", journal_identity(definition, node), 16 << 20, encode_secondary(secondary)
        )  # fmt: skip
    (node.directory / "state").unlink()
    SlotFile.create(node.directory / "state", state_identity(definition, node), encode_primary(primary))
    found: list[DataNode] = []

    async def start() -> None:
        one = DataNode(definition, node)
        found.append(one)
        then(one)
        one.disk.close()
        one.workers.close()

    asyncio.run(start())
    return found[0]


def test_a_primary_is_created_as_a_source_and_a_secondary_as_a_target(definition: Definition) -> None:
    assert opened(definition, "p1", None, PrimaryState()).source is not None
    assert opened(definition, "s1", None, PrimaryState()).source is None


def test_a_takeover_that_was_stored_before_a_crash_is_finished_at_the_start(definition: Definition) -> None:
    taken = SecondaryState(epoch=NEW, promised=NEW, number=80, rolling=True, active=True, writable=True)
    node = opened(definition, "s1", taken, PrimaryState(epoch=OLD, incarnation=7, checkpoint=60))
    assert node.source is not None
    state = node.source.host.role.state
    assert (state.suspended, state.alone, state.detached, state.direction) == (int(Pair.SSWS), True, True, 1)
    assert (state.epoch, state.incarnation, state.checkpoint) == (NEW, 8, 0)


def test_what_was_written_alone_since_the_takeover_is_kept_at_a_restart(definition: Definition) -> None:
    taken = SecondaryState(epoch=NEW, promised=NEW, number=80, rolling=True, active=True, writable=True)
    since = PrimaryState(epoch=NEW, incarnation=3, suspended=int(Pair.PSUE), alone=True, direction=1)
    node = opened(definition, "s1", taken, since)
    assert node.source is not None
    assert node.source.host.role.state.suspended == int(Pair.PSUE)
    assert not node.source.host.role.state.detached


def test_a_state_that_cannot_be_stored_stops_a_node_that_has_just_taken_over(definition: Definition) -> None:
    """It is active, durably, and serves nothing: the next process does."""
    node = opened(definition, "s1", None, PrimaryState())
    assert node.target is not None
    node.target.host.role.state.active = True
    node._state_file.failed = StorageError("cannot write state: no space left")
    node._activated()
    assert node.source is None
    assert (node.target.host.role.phase.value, node.target.host.role.reason) == (
        "failed", "cannot write state: no space left"
    )  # fmt: skip


def test_a_swap_needs_an_address_of_every_node(definition: Definition) -> None:
    text = definition.path.read_text()
    lines = text.splitlines()
    at = lines.index('name = "p1"')
    place = next(i for i in range(at, len(lines)) if lines[i].startswith("listen"))
    definition.path.write_text("\n".join(lines[:place] + lines[place + 1 :]))
    with pytest.raises(UsageError, match="p1 has no `listen` address") as caught:
        question(load(definition.path), definition.node("s1"))
    assert "[[node]] of p1" in caught.value.hint


def test_a_source_that_was_live_for_less_than_a_tick_does_not_promise_as_one_that_is_new(
    definition: Definition,
) -> None:
    """It died right behind WELCOME: its role beside the primary had not heard of the epoch yet."""
    asked = {"epoch": Epoch(9, b"r" * 16), "dry_run": True, "reform": True, "marker": ""}
    node = opened(
        definition, "p1", None, PrimaryState(epoch=NEW, promised=NEW),
        then=lambda node: node.message(7, Message.PROMISE, asked, 0),
    )  # fmt: skip
    assert node.target is not None
    assert node.target.host.role.state.epoch == NEW
