"""The check at the end of each test run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.leftovers import leftovers, wait_for_none

ROOT = Path(__file__).resolve().parents[1]


def test_a_process_that_names_a_path_below_or_works_there_is_found_until_it_ends(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place10").mkdir()
    place = tmp_path / "place"
    with (
        subprocess.Popen(["sh", "-c", "read x", str(place / "group.toml")], stdin=subprocess.PIPE) as names,
        subprocess.Popen(["cat"], cwd=place, stdin=subprocess.PIPE) as works,
        subprocess.Popen(["cat"], cwd=tmp_path / "place10", stdin=subprocess.PIPE) as elsewhere,
    ):
        pids = {int(line.split()[1]) for line in leftovers(f"{place}/")}
        assert pids == {names.pid, works.pid}
        for process in (names, works, elsewhere):
            process.communicate()
    assert wait_for_none(f"{place}/") == []


CONFTEST = """
from pathlib import Path
from tests import leftovers
leftovers.IMAGES = Path(__file__).parent / "images"
"""
TEST = """
import subprocess
from pathlib import Path

def test_all_is_well(tmp_path):
    process = subprocess.Popen(["sleep", "600"], cwd=tmp_path)
    Path("pid").write_text(str(process.pid))
    Path("images/left.img").touch()
"""


def test_a_run_that_leaves_something_fails_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "before.img").touch()
    for name, text in (("pytest.ini", "[pytest]\ntimeout = 60"), ("conftest.py", CONFTEST), ("test_x.py", TEST)):
        (tmp_path / name).write_text(text)
    argv = [sys.executable, "-m", "pytest", "-p", "tests.leftovers", "-p", "no:cacheprovider", "--basetemp=temp"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "BLOCKREPL_TEST_PATIENCE": "0.01"}
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert "1 passed, 2 left behind in" in done.stdout
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGKILL)
    assert f"process {pid} in {tmp_path}/temp/test_all_is_well0/: sleep 600" in done.stdout
    assert f"{tmp_path}/images/left.img" in done.stdout
    assert "before.img" not in done.stdout
    assert done.returncode == 1
