"""A takeover in mid-copy goes back; the old primaries, which had gone forward and had checkpointed that, go back too.

What was undone at the secondaries differs from then on, and nobody sends it again: the intermediate has it in its
bits until END, a primary in the ranges that it remembers. Either is enough; without both everything is compared (rules
8 and 20).
"""

from __future__ import annotations

import pytest

from blockrepl.cli.client import call
from blockrepl.node.create import create
from tests.system.conftest import MakeGroup
from tests.system.group import PRIMARIES, SECONDARIES, VOLUMES, A, B, RealGroup, answers, wait_for
from tests.system.test_pair import do, paired, quiet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BLOCK = 64 << 10
SMALL = dict.fromkeys(VOLUMES, "16MiB")
FRESH = (200, 210, 220)  # blocks that no bit speaks of before the copy
AT_S = 250


def in_mid_copy(group: RealGroup) -> int:
    """Hosts write while a copy is under way; all of that is applied at s1 and s2, and checkpointed. Returns the number
    that a takeover goes back to."""
    volumes = {name: group.open(name) for name in (A, B)}
    for volume in volumes.values():
        for block in (*range(60), *FRESH):
            volume.write(block * BLOCK, b"before".ljust(4096))
        volume.flush()
    group.settle()
    do(group, "pair", "split", "--rw")
    do(group, "pair", "wait", "-s", "PSUS", "-t", "60")
    wait_for(lambda: all(group.status(name)["split"] for name in SECONDARIES), "both are split")
    other = group.open(A, secondary=True)  # else the journal has all, and nothing is copied
    other.write(AT_S * BLOCK, b"at the secondary".ljust(4096), durable=True)
    other.close()
    for volume in volumes.values():
        for block in range(60):
            volume.write(block * BLOCK, b"split".ljust(4096))
        volume.flush()
    do(group, "pair", "resync", "--rate", "64KiB")
    wait_for(lambda: all(group.status(name)["copying"] for name in SECONDARIES), "the copy has begun")
    for volume in volumes.values():
        for block in FRESH:
            volume.write(block * BLOCK, b"in mid-copy".ljust(4096), durable=True)
        volume.close()
    number = group.marks("i1")["numbered"]
    for name in SECONDARIES:
        wait_for(lambda name=name: group.marks(name)["applied"] >= number, f"{name} has it")  # type: ignore[misc]
    last = {peer["node"]: peer["last"] for peer in group.status("i1")["peers"] if peer["role"] == "primary"}
    for name in PRIMARIES:
        wait_for(lambda name=name: group.marks(name)["checkpoint"] >= last[name] - 20, f"{name} checkpoints")  # type: ignore[misc]
    wait_for(lambda: all(group.marks(name)["checkpoint"] >= number for name in PRIMARIES), "it is checkpointed")
    assert group.status("i1")["pair"] == "COPY"
    return int(group.status("s1")["copy_from"])


@pytest.mark.parametrize("lost", ["nothing", "ranges", "bits", "both"])
def test_what_was_undone_at_the_secondaries_is_undone_at_the_old_primaries(make_group: MakeGroup, lost: str) -> None:
    group = make_group(sizes=SMALL, policy="checkpoint_s = 0.2").create().start()
    back = in_mid_copy(group)
    if lost in ("ranges", "both"):
        group.kill(*PRIMARIES)
    if lost in ("bits", "both"):
        group.kill("i1")
    done = call(group.node("s1").directory, "takeover", {}, timeout_s=120)
    assert (done["number"], done["lossless"]) == (back, False)
    assert done["rolled_back_from"] is not None
    if lost in ("bits", "both"):
        for path in group.node("i1").directory.iterdir():
            if path.name not in ("node.log", "node.pid"):
                path.unlink()
        create(group.definition, group.node("i1"))
        group.start("i1", wait=False)
    if lost in ("ranges", "both"):
        group.start(*PRIMARIES, wait=False)
    for name in (*PRIMARIES, "i1"):
        wait_for(lambda name=name: answers(lambda: group.status(name)), f"{name} answers")  # type: ignore[misc]
    assert set(group.differing()) >= {A, B}
    told = do(group, "pair", "resync", "--swap").stdout
    assert ("everything is compared" in told) == (lost == "both")
    paired(group)
    quiet(group)
    assert group.differing() == []
    for name in (A, B):
        image = group.images(name)[0].read_bytes()
        for block in (*range(60), *FRESH):
            assert image[block * BLOCK :].startswith(b"before"), block
