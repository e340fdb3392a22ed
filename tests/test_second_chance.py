"""The second chance, on small test suites of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.second_chance import MOST, REAL, deserving

ROOT = Path(__file__).resolve().parents[1]
ONCE = """
from pathlib import Path
import pytest

def test_well():
    pass

@pytest.mark.parametrize("name", {names})
def test_fails(name):
    times = Path("times-" + name)
    before = int(times.read_text()) if times.exists() else 0
    times.write_text(str(before + 1))
    assert before >= {failures}, "too early"
"""


def suite(folder: Path, where: str, *, failures: int, names: tuple[str, ...] = ("a", "b")) -> str:
    """A test that fails so often for each name; what pytest said of it, with two workers."""
    path = folder / where
    path.parent.mkdir(parents=True)
    path.write_text(ONCE.format(names=names, failures=failures))
    (folder / "pytest.ini").write_text("[pytest]")
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--second-chance",
        "-p",
        "no:cacheprovider",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "-p tests.second_chance"}
    pipe = subprocess.PIPE
    done = subprocess.run(argv, cwd=folder, stdout=pipe, stderr=subprocess.DEVNULL, text=True, check=False, env=env)
    return f"{done.stdout}ended with {done.returncode}"


def test_what_passes_alone_is_told_by_name_and_the_run_passes(tmp_path: Path) -> None:
    said = suite(tmp_path, "tests/system/test_x.py", failures=1)
    assert "tests/system/test_x.py::test_fails[a] passed alone" in said
    assert "tests/system/test_x.py::test_fails[b] failed beside others, and passed only when alone" in said
    assert "AssertionError: too early" in said  # the reason is still to be seen
    assert "1 passed, 2 passed only when alone in " in said.splitlines()[-2]
    assert said.endswith("ended with 0")


def test_what_fails_twice_fails_the_run(tmp_path: Path) -> None:
    said = suite(tmp_path, "tests/cli/test_x.py", failures=2, names=("a",))
    assert "tests/cli/test_x.py::test_fails[a] FAILED again" in said
    assert "1 failed, 1 passed in " in said
    assert said.endswith("ended with 1")


def test_tests_without_processes_get_no_second_chance(tmp_path: Path) -> None:
    said = suite(tmp_path, "tests/sim/test_x.py", failures=1, names=("a",))
    assert "second chance" not in said
    assert said.endswith("ended with 1")
    assert (tmp_path / "times-a").read_text() == "1"


@pytest.mark.parametrize(
    ("names", "deserve"),
    [
        ([], False),
        ([f"{REAL[0]}test_a.py::test_b[{number}]" for number in range(MOST)], True),
        ([f"{REAL[0]}test_a.py::test_b[{number}]" for number in range(MOST + 1)], False),
        ([f"{REAL[0]}test_a.py::test_b", "tests/storage/test_a.py::test_b"], False),
    ],
    ids=["nobody", "few", "too many", "others too"],
)
def test_a_second_chance_is_given_only_when_it_may_change_the_verdict(names: list[str], deserve: bool) -> None:
    assert deserving(names) is deserve
