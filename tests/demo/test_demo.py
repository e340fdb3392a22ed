"""scripts/demo as people run it, on ports of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.ports import free_ports
from tests.leftovers import leftovers, wait_for_none
from tests.patience import patient

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
        command("--json", str(path), *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patient(580),
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, json.loads(path.read_text()) if path.exists() else {}


def left() -> list[str]:
    """What lives in the demo's directory still, and the directory."""
    return [*([str(HOME)] if HOME.exists() else []), *leftovers(f"{HOME}/")]


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
    assert left() == []


def test_the_planted_bug_is_noticed(tmp_path: Path) -> None:
    status, output, document = demo(tmp_path, "--break-ordering", "--only", "intermediate-lost")
    assert status == 1, output
    assert document["order_violations"] > 0
    assert document["scenarios"][0]["order_violations"] == document["order_violations"]
    assert left() == []


def test_over_nbd_it_says_so_first_and_tells_the_same_story(tmp_path: Path) -> None:
    status, output, document = demo(tmp_path, "--nbd", "--only", "intermediate-lost")
    assert status == 0, output
    assert output.startswith("No file systems on loop devices")
    assert document["scenarios"][0]["order_violations"] == 0
    assert document["scenarios"][0]["acked_writes"] > document["scenarios"][0]["acked_writes_lost"]
    assert left() == []


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
    assert process.wait(patient(300)) == 130, rest
    assert "interrupted" in rest
    assert left() == []


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
    assert left() != []
    status, output, _ = demo(tmp_path, "--nbd", "--only", "intermediate-lost")
    assert status == 0, output
    assert wait_for_none(f"{HOME}/") == []  # fio, whose disk is gone, may take its time
    assert left() == []


def test_a_port_that_is_taken_is_named_with_its_node() -> None:
    base = free_ports(PORTS)[0]
    with socket.create_server(("127.0.0.1", base + 2)):
        argv = [sys.executable, "-m", "scripts.demolib", "--port-base", str(base)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=patient(60), check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{base + 2}, where node p2" in done.stderr
    assert left() == []
