"""``up`` and ``down`` over processes that really run, and really refuse to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from blockrepl.cli import processes, registry
from tests.cli.conftest import FakeGroup, Run


def test_up_starts_every_node_and_is_harmless_again(group: FakeGroup, run: Run) -> None:
    first = run("up", group.path)
    assert (first.code, first.err) == (0, "")
    pids = {node.name: processes.pid_of(node) for node in group.definition.nodes}
    assert None not in pids.values()
    again = run("up", group.path)
    assert again.code == 0
    assert again.out.splitlines()[-1] == f"p2: already running, pid {pids['p2']}"
    assert pids == {node.name: processes.pid_of(node) for node in group.definition.nodes}


def test_up_waits_until_nodes_say_they_are_ready(group: FakeGroup, run: Run) -> None:
    group.plan("p1", ready_after=3)
    assert run("up", group.path).code == 0
    statuses = run("status", group.path, "--json").json["nodes"]
    assert [node["ready"] for node in statuses] == [True] * 5


def test_up_says_which_node_is_not_ready_in_time(group: FakeGroup, run: Run) -> None:
    group.plan("p1", ready_after=1 << 30)
    result = run("up", group.path, "--node", "p1", "--timeout", "0.1")
    assert result.code == 6
    assert "node p1 runs, but is not ready yet" in result.err
    assert str(group.node("p1").directory / "node.log") in result.err


def test_up_shows_the_log_and_exit_code_of_a_node_that_does_not_start(group: FakeGroup, run: Run) -> None:
    (group.node("s1").directory / "node.log").write_text("a line of last week\n")
    group.plan("s1", exit=24)
    result = run("up", group.path)
    assert result.code == 24
    assert "blockrepl: node s1 did not start: exit code 24\n  something terrible happened to my disk\n" in result.err
    assert "last week" not in result.err
    assert "the other nodes run" in result.err
    assert processes.pid_of(group.node("p1")) is not None


def test_up_of_a_node_that_was_never_created_says_how(group: FakeGroup, run: Run) -> None:
    group.node("i1").directory.rmdir()
    result = run("up", group.path, "--node", "i1")
    assert result.code == 21
    assert f"hint: a new group: blockrepl create {group.path}; a lost disk: blockrepl replace" in result.err


def test_down_stops_primaries_first_and_secondaries_last_and_is_harmless_again(group: FakeGroup, run: Run) -> None:
    run("up", group.path)
    assert registry.groups() == {"demo": group.path}
    result = run("down", group.path)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [f"{name}: stopped" for name in ("p1", "p2", "i1", "s1", "s2")]
    assert registry.groups() == {}
    assert not list(group.path.parent.glob("*/node.pid"))
    assert run("down", group.path).out.splitlines()[0] == "p1: not running"


def test_down_ends_a_node_that_does_not_stop_and_says_so(group: FakeGroup, run: Run) -> None:
    group.plan("p1", ignore=["stop"])
    group.plan("p2", ignore=["stop", "term"])
    run("up", group.path)
    result = run("down", group.path, "--timeout", "2")  # the others must have stopped by then
    assert result.code == 0
    assert "p1: ended by SIGTERM: it did not stop within 2 s" in result.out
    assert "p2: ended by SIGKILL: it did not stop within 2 s" in result.out
    assert processes.pid_of(group.node("p1")) is None


def test_down_ends_a_node_that_is_frozen(group: FakeGroup, run: Run) -> None:
    run("up", group.path)
    pid = processes.pid_of(group.node("s1"))
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    result = run("down", group.path, "--node", "s1", "--timeout", "0.2")
    assert "s1: ended by SIGKILL: " in result.out
    assert "no answer to stop for 0.2 s" in result.out


def test_up_starts_a_node_again_after_kill_9(group: FakeGroup, run: Run) -> None:
    run("up", group.path)
    pid = processes.pid_of(group.node("p1"))
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    os.close(pidfd)
    result = run("up", group.path)
    assert result.code == 0
    assert "p1: started" in result.out
    assert "p2: already running" in result.out


def test_a_pid_file_that_names_another_process_is_not_believed(group: FakeGroup, run: Run) -> None:
    (group.node("p1").directory / "node.pid").write_text(str(os.getpid()))
    assert processes.pid_of(group.node("p1")) is None
    assert run("down", group.path, "--node", "p1").out == "p1: not running\n"


def test_nodes_of_other_machines_are_not_started(group: FakeGroup, run: Run) -> None:
    group.path.write_text(group.path.read_text().replace("role =", 'host = "far-away.example"\nrole ='))
    result = run("up", group.path)
    assert result.code == 2
    assert "no node" in result.err
    assert "far-away.example" in result.err


def test_a_pipe_that_closes_early_is_no_error(group: FakeGroup) -> None:
    shell = f"{sys.executable} -m blockrepl.cli.main status --json {group.path} | head -c 1"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, check=True, cwd=Path(__file__).parent.parent.parent)
    assert (done.stdout, done.stderr) == (b"{", b"")
