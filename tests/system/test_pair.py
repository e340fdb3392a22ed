"""The life of a pair on real processes, by the command line as a user types it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blockrepl.cli.client import call
from blockrepl.errors import BlockreplError, UsageError
from blockrepl.node.create import create
from tests.system.conftest import MakeGroup
from tests.system.group import PRIMARIES, SECONDARIES, TIMEOUT_S, VOLUMES, A, B, RealGroup, answers, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BLOCK = 64 << 10
LONG = f"{2 * TIMEOUT_S:g}"  # seconds, of a command
MIB = 1 << 20
SMALL = dict.fromkeys(VOLUMES, "16MiB")


def do(group: RealGroup, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = group.cli(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def paired(group: RealGroup) -> None:
    """PAIR, and nobody copies any more."""
    do(group, "pair", "wait", "-s", "PAIR", "-t", LONG)
    data = [*PRIMARIES, *SECONDARIES]
    wait_for(lambda: not any(group.status(name).get("copying") for name in data), "the end of the copy")


def together(group: RealGroup) -> None:
    """PAIR again. With fence never a machine that stalls for a lease suspends the group anew, and rightly."""

    def resynced() -> bool:
        pair = (answers(lambda: group.status("i1")) or {}).get("pair")
        if pair == "PSUE":
            group.cli("pair", "resync")
        return pair == "PAIR"

    wait_for(resynced, "PAIR")
    paired(group)


def quiet(group: RealGroup) -> None:
    """Everything numbered is applied at every target."""

    def applied() -> bool:
        numbered = group.marks("i1")["numbered"]
        targets = [name for name in (*PRIMARIES, *SECONDARIES) if "copying" in group.status(name)]
        return bool(targets) and all(group.marks(name)["applied"] == numbered for name in targets)

    wait_for(applied, "everything numbered is applied")


def sent_bytes(group: RealGroup) -> int:
    """What the sources have read for copies since they started."""
    return sum(group.status(name).get("copied_bytes") or 0 for name in (*PRIMARIES, *SECONDARIES))


def differing_bytes(group: RealGroup) -> int:
    """Blocks in which the images differ now."""
    total = 0
    for name in VOLUMES:
        one, other = (path.read_bytes() for path in group.images(name))
        total += sum(BLOCK for at in range(0, len(one), BLOCK) if one[at : at + BLOCK] != other[at : at + BLOCK])
    return total


def test_a_split_group_is_brought_together_again_under_fio(make_group: MakeGroup, fio: None) -> None:
    group = make_group(sizes=SMALL).create().start()
    load = group.fio("--rw=randwrite", "--bs=4k", "--iodepth=8", "--time_based", "--runtime=600", "--size=8m")
    wait_for(lambda: group.marks("i1")["numbered"] > 500, "some writes")
    for _ in range(2):
        do(group, "pair", "split")
        do(group, "pair", "wait", "-s", "PSUS", "-t", LONG)
        at = group.marks("s1")["applied"]
        numbered = group.marks("i1")["numbered"]
        wait_for(partial(_numbered_above, group, numbered + 200), "writes after the split")
        assert group.marks("s1")["applied"] == at
        do(group, "pair", "resync")
        paired(group)
    assert load.poll() is None
    load.terminate()
    load.wait(TIMEOUT_S)
    group.settle()
    assert group.differing() == []


def test_an_adopted_disk_is_copied_while_hosts_write(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL)
    image = group.images(A)[0]
    image.parent.mkdir()
    disk = os.urandom(3 * MIB) + bytes(10 * MIB) + os.urandom(3 * MIB)
    image.write_bytes(disk)
    refused = do(group, "create", "--node", "p1", code=2)
    assert "create --adopt" in refused.stderr
    assert f"p1: adopted {A}" in do(group, "create", "--adopt").stdout
    group.start()
    do(group, "pair", "wait", "-s", "PSUE", "-t", LONG)
    volume = group.open(A)
    assert volume.read(0, MIB) == disk[:MIB]
    do(group, "pair", "create", "--rate", "20MiB")
    volume.write(5 * MIB, b"w" * BLOCK, durable=True)
    paired(group)
    volume.write(0, b"x" * BLOCK, durable=True)
    quiet(group)
    assert group.differing() == []
    copy = group.images(A)[1].read_bytes()
    assert copy[BLOCK : 3 * MIB] == disk[BLOCK : 3 * MIB]
    assert copy[-3 * MIB :] == disk[-3 * MIB :]
    assert copy[5 * MIB : 5 * MIB + BLOCK] == b"w" * BLOCK


def test_a_planned_swap_loses_nothing_copies_nothing_and_hosts_go_on_at_the_other_site(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL).create().start()
    volume = group.open(A)
    for at in range(32):
        volume.write(at * BLOCK, bytes([at + 1]) * BLOCK)
    done = do(group, "pair", "resync", "--swap")
    assert "s1, s2 copy to p1, p2" in done.stdout
    with pytest.raises(OSError, match=r".*"):
        volume.write(0, b"late".ljust(4096))
    paired(group)
    assert sent_bytes(group) == 0
    other = group.open(A, secondary=True)
    assert all(other.read(at * BLOCK, BLOCK) == bytes([at + 1]) * BLOCK for at in range(32))
    other.write(0, b"at the other site".ljust(4096), durable=True)
    quiet(group)
    assert group.differing() == []
    with pytest.raises(OSError, match=r".*"):
        group.open(A)
    back = do(group, "pair", "resync", "--swap")
    assert "p1, p2 copy to s1, s2" in back.stdout
    paired(group)
    assert group.open(A).read(0, 4096) == b"at the other site".ljust(4096)
    assert group.differing() == []


def test_failover_and_failback_again_and_again_send_only_what_differs(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL).create().start()
    hosts, away = PRIMARIES, SECONDARIES
    expected: dict[str, bytearray] = {name: bytearray(16 * MIB) for name in (A, B)}

    def write(count: int, *, secondary: bool) -> None:
        for name in (A, B):
            volume = group.open(name, secondary=secondary)
            for _ in range(count):
                at = int.from_bytes(os.urandom(4)) % (16 * MIB - 4096) // 4096 * 4096
                payload = os.urandom(4096)
                volume.write(at, payload)
                expected[name][at : at + 4096] = payload
            volume.flush()
            volume.close()

    for round_number in range(3):
        at_secondary = hosts == SECONDARIES
        write(40, secondary=at_secondary)
        group.kill(*hosts)
        call(group.node(away[0]).directory, "takeover", {}, timeout_s=2 * TIMEOUT_S)
        write(30, secondary=not at_secondary)
        group.start(*hosts, wait=False)
        wait_for(partial(_all_answer, group, hosts), "the old site answers")
        differ = differing_bytes(group)
        assert differ > 0
        before = sent_bytes(group)
        do(group, "pair", "resync", "--swap")
        write(0, secondary=not at_secondary)
        paired(group)
        sent = sent_bytes(group) - before
        assert sent <= 1.05 * differ, (round_number, sent, differ)
        quiet(group)
        assert group.differing() == []
        for name in (A, B):
            assert group.images(name)[0].read_bytes() == bytes(expected[name])
        hosts, away = away, hosts


def _numbered_above(group: RealGroup, number: int) -> bool:
    return bool(group.marks("i1")["numbered"] > number)


def _all_answer(group: RealGroup, names: tuple[str, ...]) -> bool:
    return all(_answers(group, name) for name in names)


def _answers(group: RealGroup, name: str) -> Any:
    return answers(lambda: group.status(name))


def test_with_fence_never_hosts_go_on_alone_and_come_back(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL, keys='fence = "never"', policy="lease_s = 2.0").create().start()
    volume, log = group.open(A), group.open(B)
    volume.write(0, b"a" * BLOCK, durable=True)
    group.kill("i1")
    volume.write(BLOCK, b"b" * BLOCK, durable=True)
    log.write(7 * BLOCK, b"c" * 4096, durable=True)
    assert group.status("p1")["suspended"] == "PSUE"
    assert group.status("p1")["out_of_sync_bytes"][A] >= BLOCK
    do(group, "pair", "wait", "-s", "PSUE", "-t", LONG)
    group.kill("p1")
    group.start("p1", wait=False)
    wait_for(lambda: _answers(group, "p1"), "p1 answers")
    told = group.status("p1")
    assert (told["ready"], "--alone" in told["reason"]) == (False, True)
    assert group.open(A).read(BLOCK, 4096) == b"b" * 4096
    group.kill("p1")
    group.start("p1", options=("--alone",))
    volume = group.open(A)
    volume.write(2 * BLOCK, b"B" * 4096, durable=True)
    group.start("i1", wait=False)
    wait_for(lambda: _answers(group, "i1"), "the intermediate answers")

    def resynced() -> bool:
        return group.cli("pair", "resync").returncode == 0 or group.status("i1")["pair"] in ("COPY", "PAIR")

    wait_for(resynced, "all are connected")
    volume.write(3 * BLOCK, b"d" * 4096, durable=True)
    together(group)
    volume.write(4 * BLOCK, b"e" * 4096, durable=True)
    together(group)
    quiet(group)
    assert group.differing() == []


def test_a_swap_does_not_give_up_what_a_primary_completed_alone_that_nobody_has_heard_of(make_group: MakeGroup) -> None:
    """The intermediate was restarted, and was in PAIR when it stopped."""
    group = make_group(sizes=SMALL, keys='fence = "never"', policy="lease_s = 2.0").create().start()
    volume = group.open(A)
    volume.write(0, b"a" * BLOCK, durable=True)
    group.settle()
    group.kill("i1")
    volume.write(BLOCK, b"alone".ljust(4096), durable=True)
    group.signal("p1", signal.SIGSTOP)
    group.start("i1", wait=False)
    wait_for(lambda: (_answers(group, "i1") or {}).get("state") == "serving", "the intermediate serves")
    told = group.status("i1")
    assert (told["pair"], "may have gone on alone" in told["pair_reason"]) == ("PSUE", True)
    dry = call(group.node("s1").directory, "takeover", {"dry_run": True}, timeout_s=120)
    assert (dry["lossless"], dry["alone"]) == (False, True)
    refused = do(group, "pair", "resync", "--swap", code=2)
    assert "not possible in state PSUE" in refused.stderr
    with pytest.raises(UsageError, match="a swap loses nothing"):  # whoever asks past the command line
        call(group.node("s1").directory, "takeover", {"planned": True}, timeout_s=120)
    group.signal("p1", signal.SIGCONT)
    wait_for(lambda: "gone on alone" in group.status("i1")["pair_reason"], "p1 has said so")
    together(group)
    wait_for(lambda: group.cli("pair", "resync", "--swap").returncode == 0, "the swap")
    paired(group)
    assert group.open(A, secondary=True).read(BLOCK, 4096) == b"alone".ljust(4096)
    assert group.differing() == []


def test_a_secondary_that_was_lost_is_replaced_by_an_empty_one(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL).create().start()
    volume = group.open(A)
    volume.write(0, os.urandom(2 * MIB), durable=True)
    group.settle()
    group.kill("s1")
    _empty(group.node("s1").directory)
    create(group.definition, group.node("s1"))
    group.start("s1")
    volume.write(4 * MIB, b"meanwhile".ljust(4096))
    do(group, "replace", "--node", "s1")
    paired(group)
    quiet(group)
    assert group.differing() == []
    refused = do(group, "replace", "--node", "s1", code=2)
    assert "not new" in refused.stderr or "nothing" in refused.stderr


def test_an_intermediate_that_was_lost_is_replaced_by_an_empty_one(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL).create().start()
    volume = group.open(A)
    volume.write(0, os.urandom(2 * MIB), durable=True)
    group.settle()
    group.kill("i1")
    _empty(group.node("i1").directory)
    create(group.definition, group.node("i1"))
    group.start("i1", wait=False)
    wait_for(lambda: (_answers(group, "i1") or {}).get("state") == "fenced", "the new one knows that it is new")
    assert "blockrepl replace" in group.status("i1")["reason"]
    do(group, "replace", "--node", "i1")
    paired(group)
    volume.write(4 * MIB, b"afterwards".ljust(4096), durable=True)
    quiet(group)
    assert group.differing() == []


def test_an_old_primary_is_explained_and_what_only_it_has_is_listed(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL).create().start()
    volume = group.open(A)
    volume.write(0, b"a" * BLOCK, durable=True)
    group.settle()
    for name in SECONDARIES:
        group.signal(name, signal.SIGSTOP)
    volume.write(3 * MIB, b"lost".ljust(4096), durable=True)
    group.kill("i1", *SECONDARIES)
    group.start(*SECONDARIES)
    group.takeover(force=True)
    listed = f"p1/{A}: 4096 bytes at {3 * MIB}, number"
    told = do(group, "explain").stdout
    for words in ("is in SSWS", "way 1", "way 2", "next: blockrepl up", "pair resync system --swap", listed):
        assert words in told, told
    refused = do(group, "pair", "resync", "--swap", code=2)
    assert "silent: i1" in refused.stderr
    assert "blockrepl up --node i1" in refused.stderr
    group.kill("p1")
    group.start("i1", "p1", wait=False)
    wait_for(partial(_all_answer, group, ("i1", "p1")), "the old site is back")
    assert listed in do(group, "explain").stdout  # it forgot, the intermediate's journal did not
    do(group, "pair", "resync", "--swap")
    paired(group)
    quiet(group)
    assert group.differing() == []
    assert group.open(A, secondary=True).read(3 * MIB, 4096) == bytes(4096)


def test_a_swap_that_is_refused_stops_nothing(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL).create().start()
    epoch = group.status("i1")["epoch"]
    with pytest.raises(UsageError, match="nothing is to be formed anew"):
        call(group.node("p1").directory, "reform", {"kind": "swap"}, timeout_s=2 * TIMEOUT_S)
    status = group.status("i1")
    assert status["state"] == "serving", "it was asked for no promise"
    assert status["promised"] in (None, epoch)
    group.open(A).write(0, b"a" * BLOCK, durable=True)


def test_while_a_group_is_formed_anew_the_intermediate_has_a_status(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL).create().start()
    problems: list[str] = []
    seen: set[str] = set()
    ending = threading.Event()

    def look() -> None:
        while not ending.is_set():
            try:
                seen.add(group.status("i1")["state"])
            except BlockreplError as error:
                problems.append(str(error))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for leader, source in (("s1", "s1"), ("p1", "p1")):
            call(group.node(leader).directory, "takeover", {}, timeout_s=2 * TIMEOUT_S)
            call(group.node(source).directory, "reform", {"kind": "swap"}, timeout_s=2 * TIMEOUT_S)
            paired(group)
    finally:
        ending.set()
        looking.join()
    assert problems == []
    assert "serving" in seen
    assert "Traceback" not in group.log("i1")


def test_the_old_site_can_be_kept_instead(make_group: MakeGroup) -> None:
    group = make_group(sizes=SMALL).create().start()
    volume = group.open(A)
    volume.write(0, b"a" * BLOCK, durable=True)
    group.settle()
    group.takeover()
    other = group.open(A, secondary=True)
    other.write(MIB, b"given up".ljust(4096), durable=True)
    refused = group.node("p1").directory
    with pytest.raises(UsageError, match="has taken over later, in epoch 2"):
        call(refused, "reform", {"kind": "swap"}, timeout_s=2 * TIMEOUT_S)
    call(refused, "reform", {"kind": "swap", "force": True}, timeout_s=2 * TIMEOUT_S)
    paired(group)
    volume = group.open(A)
    assert volume.read(MIB, 4096) == bytes(4096)
    volume.write(2 * MIB, b"goes on".ljust(4096), durable=True)
    quiet(group)
    assert group.differing() == []
    with pytest.raises(OSError, match=r".*"):
        other.write(MIB, b"late".ljust(4096))


def _empty(directory: Path) -> None:
    """A new disk."""
    for path in directory.iterdir():
        if path.name not in ("node.log", "node.pid"):
            path.unlink()
