"""scripts/demo as people run it, on ports of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.ports import free_ports

ROOT = Path(__file__).parents[2]
HOME = ROOT / "images" / "demo-run"
PORTS = 9  # of targets/demo.toml
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.demolib", "--port-base", str(free_ports(PORTS)[0]), *arguments]


def demo(tmp_path: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """(exit status, output, the JSON)."""
    path = tmp_path / "demo.json"
    done = subprocess.run(
        command("--json", str(path), *arguments), cwd=ROOT, capture_output=True, text=True, timeout=580, check=False
    )
    return done.returncode, done.stdout + done.stderr, json.loads(path.read_text()) if path.exists() else {}


def leftovers() -> list[str]:
    """What lives in the demo's directory still: files, mounts, loop devices, processes."""
    found = [str(HOME)] if HOME.exists() else []
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(HOME) in line]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found += [backing.read_text()] if str(HOME) in backing.read_text() else []
        except OSError:
            continue
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes()
        except OSError:
            continue
        found += [repr(words)] if str(HOME).encode() in words else []
    return found


def test_nothing_acknowledged_is_lost_while_the_intermediate_lives_and_a_prefix_remains_without_it(
    tmp_path: Path,
) -> None:
    status, output, document = demo(tmp_path)
    assert status == 0, output
    alive, lost = document["scenarios"]
    assert document["ok"]
    assert (alive["acked_writes_lost"], alive["order_violations"], lost["order_violations"]) == (0, 0, 0)
    assert alive["acked_writes"] > 0
    assert lost["acked_writes"] > lost["acked_writes_lost"]
    assert all(each["takeover_seconds"] > 0 for each in document["scenarios"])
    checked = [found for each in document["scenarios"] for found in each["fsck"].values()]
    assert len(checked) == 4
    assert all(found is None or found["clean"] for found in checked)
    assert "No file systems" in output or all(checked)
    assert leftovers() == []


def test_the_planted_bug_is_noticed(tmp_path: Path) -> None:
    status, output, document = demo(tmp_path, "--break-ordering", "--only", "intermediate-lost")
    assert status == 1, output
    assert document["order_violations"] > 0
    assert document["scenarios"][0]["order_violations"] == document["order_violations"]
    assert leftovers() == []


def test_over_nbd_it_says_so_first_and_tells_the_same_story(tmp_path: Path) -> None:
    status, output, document = demo(tmp_path, "--nbd", "--only", "intermediate-lost")
    assert status == 0, output
    assert output.startswith("No file systems on loop devices")
    assert document["scenarios"][0]["order_violations"] == 0
    assert document["scenarios"][0]["acked_writes"] > document["scenarios"][0]["acked_writes_lost"]
    assert leftovers() == []


def test_interrupted_it_leaves_nothing_behind() -> None:
    process = subprocess.Popen(
        command("--plain"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "a writer puts" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(300) == 130, rest
    assert "interrupted" in rest
    assert leftovers() == []


def test_after_a_killed_one_the_next_cleans_up(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--plain"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "fio:" in line or "a writer puts" in line:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    assert leftovers() != []
    status, output, _ = demo(tmp_path, "--nbd", "--only", "intermediate-lost")
    assert status == 0, output
    deadline_s = time.monotonic() + 60
    while leftovers() and time.monotonic() < deadline_s:  # fio, whose disk is gone, may take its time
        time.sleep(0.1)
    assert leftovers() == []


def test_a_port_that_is_taken_is_named_with_its_node() -> None:
    base = free_ports(PORTS)[0]
    with socket.create_server(("127.0.0.1", base + 2)):
        argv = [sys.executable, "-m", "scripts.demolib", "--port-base", str(base)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{base + 2}, where node p2" in done.stderr
    assert leftovers() == []
