"""A split of real processes: hosts write at both sites, and the resync makes the copies one again."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.cli.client import call
from tests.system.group import TIMEOUT_S, A, RealGroup, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BLOCK = 65536


def pair(group: RealGroup, command: str = "", **args: Any) -> str:
    """The pair state, after a command to the intermediate."""
    if command:
        call(group.node("i1").directory, command, args, timeout_s=TIMEOUT_S)
    return str(group.status("i1")["pair"])


def test_hosts_write_at_both_sides_of_a_split_and_the_resync_makes_them_one(group: RealGroup) -> None:
    primary = group.open(A)
    primary.write(0, b"p" * BLOCK, durable=True)
    group.settle()
    pair(group, "pair_split", writable=True)
    wait_for(lambda: all(group.status(name)["split"] for name in ("s1", "s2")), "the split")
    assert pair(group) == "PSUS"
    other = group.open(A, secondary=True)
    assert other.read(0, BLOCK) == b"p" * BLOCK
    other.write(5 * BLOCK, b"s" * 4096, durable=True)
    primary.write(9 * BLOCK, b"q" * 4096, durable=True)
    group.kill("s1")
    group.start("s1")
    told = group.status("s1")
    assert (told["split"], told["out_of_sync_bytes"]) == (True, BLOCK)
    other = group.open(A, secondary=True)
    assert other.read(5 * BLOCK, 4096) == b"s" * 4096
    wait_for(lambda: all(peer["connected"] for peer in group.status("i1")["peers"]), "the secondary's link")
    pair(group, "pair_resync")
    wait_for(lambda: pair(group) == "PAIR", "the end of the resync")
    wait_for(lambda: not any(group.status(name)["copying"] for name in ("s1", "s2")), "the end of the copy")
    with pytest.raises(OSError, match="Input/output error"):
        other.write(6 * BLOCK, b"too late".ljust(4096))
    told = group.status("s1")
    assert (told["split"], told["undo_bytes"], told["out_of_sync_bytes"]) == (False, 0, 0)
    primary.write(20 * BLOCK, b"z" * 4096, durable=True)
    primary.close()
    group.settle()
    assert group.differing() == []


def test_a_takeover_while_split_says_to_the_byte_what_it_gives_up(group: RealGroup) -> None:
    """The intermediate's journal has it; blocks of a copy, START and END are numbered too, and are nobody's writes."""
    primary = group.open(A)
    primary.write(0, b"p" * BLOCK, durable=True)
    pair(group, "pair_split")
    wait_for(lambda: pair(group) == "PSUS", "the split")
    for block in range(3):
        primary.write(block * BLOCK, b"q" * 8192, durable=True)
    asked = {"dry_run": True}
    dry = call(group.node("s1").directory, "takeover", asked, timeout_s=TIMEOUT_S)
    assert (dry["counted"], dry["lost_writes"], dry["lost_bytes"]) == (True, 3, 3 * 8192)
    assert dry["lost_s"] >= 0
    primary.write(7 * BLOCK, b"q" * 4096, durable=True)
    primary.close()
    done = call(group.node("s1").directory, "takeover", {}, timeout_s=TIMEOUT_S)
    assert (done["counted"], done["lost_writes"], done["lost_bytes"]) == (True, 4, 3 * 8192 + 4096)
    assert group.open(A, secondary=True).read(0, 4096) == b"p" * 4096
