from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.benchlib.process import Child, NotAvailableError, cpu_ticks, peak_bytes, rss_peak_bytes, running, tree

CHILD = "import sys; print('up', flush=True); sys.stdin.read()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_cpu_counts_own_and_reaped_children_s_ticks_whatever_the_name() -> None:
    head = "42 (od) d (na me)) S " + " ".join(str(number) for number in range(4, 14))
    assert cpu_ticks(f"{head} 1000 200 30 4 99 99") == 1234


def test_peak_memory_is_the_high_water_mark_in_bytes() -> None:
    assert peak_bytes("Name:\tx\nVmPeak:\t  999 kB\nVmHWM:\t  12 kB\nVmRSS:\t 3 kB\n") == 12288


def test_zombie_has_no_memory() -> None:
    assert peak_bytes("Name:\tx\nState:\tZ (zombie)\n") == 0


def test_process_that_is_gone_uses_nothing(tmp_path: Path) -> None:
    with running([sys.executable, "-c", "pass"], tmp_path / "log") as child:
        pid = child.pid
    assert rss_peak_bytes(pid) == 0


def test_tree_holds_children_of_children(tmp_path: Path) -> None:
    with running([sys.executable, "-c", PARENT], tmp_path / "log", pipes=True) as child:
        assert child.read_line(30) == b"up"
        root, below = tree(child.pid)
        assert root == child.pid
        assert f"PPid:\t{root}\n" in Path(f"/proc/{below}/status").read_text()
        assert rss_peak_bytes(root) > rss_peak_bytes(below) > 0
        child.stdin.close()


def test_program_that_is_missing_is_not_available(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="no-such-server is not installed"):
        Child(["no-such-server"], tmp_path / "log")


def test_server_that_ends_early_is_not_available_for_the_reason_it_gives(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('the port is taken')"]
    with (
        running(argv, tmp_path / "log") as child,
        pytest.raises(NotAvailableError, match="ended with 1: the port is taken"),
    ):
        child.wait_until(lambda: False, "it does not listen")


def test_end_of_output_is_an_empty_line(tmp_path: Path) -> None:
    with running([sys.executable, "-c", "print('last')"], tmp_path / "log", pipes=True) as child:
        assert [child.read_line(30), child.read_line(30)] == [b"last", b""]
