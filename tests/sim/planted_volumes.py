"""Planted bugs of volumes mode; see `planted.py`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from blockrepl.formats.state import IntermediateState
from blockrepl.node.intermediate_volumes import IntermediateVolumes
from tests.sim import process
from tests.sim.group import Options
from tests.sim.planted import POWER, Planted, replaced

VOLUMES = replace(POWER, volumes_mode=True)
PAIRS = Options(story="pairs", threads=12, volumes_mode=True, faults=("kill", "slow disk"))


def volumes_durable_before_the_sync() -> AbstractContextManager[Any]:
    """Rule 12: the ring gives up what an intermediate volume holds in the page cache only."""
    original = IntermediateVolumes.sync

    def sync(self: IntermediateVolumes, done: Callable[[], None]) -> None:
        self.stored_through = max(self.stored_through, self._applied)
        original(self, done)

    return replaced(IntermediateVolumes, "sync", sync)


def volumes_without_recovery() -> AbstractContextManager[Any]:
    """Rule 12: a restarted intermediate does not store again what its ring holds."""
    return replaced(IntermediateVolumes, "recover", lambda self: None)


def old_blocks_copied() -> AbstractContextManager[Any]:
    """Rule 19: the intermediate copies a block though a numbered write to it is not in the image yet."""
    return replaced(IntermediateVolumes, "_in_flight", lambda self, *_: False)


def whole_after_journal_mode() -> AbstractContextManager[Any]:
    """Volumes that missed what happened in journal mode are the source of a resync."""

    def settle_mode(state: IntermediateState, *, kept: bool, younger: bool) -> None:
        state.volumes = kept

    return replaced(process, "settle_mode", settle_mode)


PLANTED: list[tuple[Planted, Options]] = [
    (volumes_durable_before_the_sync, VOLUMES),
    (volumes_without_recovery, VOLUMES),
    (old_blocks_copied, PAIRS),
    (whole_after_journal_mode, replace(PAIRS, faults=())),
]
