"""scripts/torture as people run it: as many rounds as fit, on every kind of disk and network that this machine has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from scripts.demolib.host import why_no_loop
from tests.leftovers import IMAGES, leftovers
from tests.patience import patient
from tests.system.group import wait_for

ROOT = Path(__file__).parents[2]
MINUTES = 2.5  # with the other tests here about four, on a machine that is not busy
PLACE = f"{IMAGES}/torture-"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2700)]
needs_loop = pytest.mark.skipif(bool(why_no_loop()), reason=f"no loop devices: {why_no_loop()}")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.torturelib", *arguments]


def torture(tmp_path: Path, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    """(exit status, output, its rounds)."""
    path = tmp_path / "torture.json"
    argv = command("--json", str(path), *arguments)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=patient(880), check=False)
    assert left() == []
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads(path.read_text())["rounds"] if path.exists() else [],
    )


def left() -> list[str]:
    """What lives in a torture's directory still, and the directory."""
    return [*map(str, IMAGES.glob("torture-*")), *leftovers(PLACE)]


def test_every_round_that_fits_keeps_the_promise(tmp_path: Path) -> None:
    """Short lives: each kind comes to its turn."""
    status, output, rounds = torture(tmp_path, "--short", "--minutes", str(MINUTES))
    assert status == 0, output
    print(output)
    assert sum(round_["acknowledged"] for round_ in rounds) > 100, output
    assert sum(round_["blocks_compared"] for round_ in rounds) > 100, output
    assert sum(len(round_["faults"]) for round_ in rounds) > 0, output


def test_with_proxies_instead_of_namespaces_too(tmp_path: Path) -> None:
    status, output, rounds = torture(tmp_path, "--proxies", "--rounds", "2")
    assert status == 0, output
    assert "proxies" in output
    assert rounds[0]["acknowledged"] > 0


@needs_loop
def test_power_cuts_show_a_node_that_syncs_nothing(tmp_path: Path) -> None:
    status, output, _ = torture(tmp_path, "--only", "power", "--plant", "unsynced", "--rounds", "12")
    assert status == 1, output


def loop_devices() -> dict[str, str]:
    """Those that have a file under them, and which."""
    found = {}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            found[path.parent.parent.name] = path.read_text().strip()
    return found


def bound_still(devices: dict[str, str]) -> dict[str, str]:
    """Those of ``devices`` that are bound, to the same file or to one that has no name any more."""
    return {name: file for name, file in loop_devices().items() if name in devices and file in (devices[name], "/")}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["kills" if why_no_loop() else "power", pytest.param("files", marks=needs_loop)])
def test_interrupted_or_killed_it_leaves_nothing_that_runs_is_mounted_or_attached(
    kind: str, how: signal.Signals
) -> None:
    others = loop_devices()
    process = subprocess.Popen(
        command("--verbose", "--only", kind), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    own: dict[str, str] = {}
    for line in process.stdout:
        if line.startswith("    ") and not line.startswith("    $ "):  # a fault, which may have freed its device
            own = {name: file for name, file in loop_devices().items() if name not in others}
            own = {name: file for name, file in own.items() if file == "/" or file.startswith(PLACE)}
            if own or kind == "kills":
                break
    if how == signal.SIGKILL and os.geteuid() != 0:
        process.kill()
        pytest.skip("without namespaces nobody ends what a killed torture started")
    process.send_signal(how)
    rest = process.stdout.read()
    status = process.wait(patient(300))
    if how == signal.SIGINT:
        assert status == 130, rest
        assert left() == []
        assert not bound_still(own)
        return
    wait_for(lambda: not leftovers(PLACE) and not bound_still(own), "nothing runs, is mounted or attached any more")
    done = subprocess.run(
        command("--rounds", "0"), cwd=ROOT, capture_output=True, text=True, timeout=patient(300), check=False
    )  # the next one removes its files
    assert done.returncode == 0, done.stdout + done.stderr
    assert left() == []
