"""Node processes of this machine: start one, wait until it serves, stop it, find who serves a directory."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import blockrepl
from blockrepl.cli.client import call, connect
from blockrepl.definition import Definition, Node
from blockrepl.errors import (
    BlockreplError,
    EpochError,
    MissingError,
    NotRunningError,
    StorageError,
    TimeoutExpiredError,
)

LOG_NAME = "node.log"
PID_NAME = "node.pid"
POLL_S = 0.02
TERM_S = 5.0
KILL_S = 5.0
LOG_LINES = 8
HOPELESS: dict[str, type[BlockreplError]] = {"fenced": EpochError, "failed": StorageError}  # states without a way on


class Started(NamedTuple):
    """A node that is to become ready. ``process`` is None for one that ran before; its lines begin at the offset."""

    node: Node
    process: subprocess.Popen[bytes] | None = None
    log_offset_bytes: int = 0


def start(definition: Definition, node: Node, extra: tuple[str, ...] = ()) -> Started:
    """Run ``blockrepl serve`` in a session of its own, its output appended to node.log."""
    hint = f"a new group: blockrepl create {definition.path}; a lost disk: blockrepl replace --node {node.name}"
    try:
        with (node.directory / LOG_NAME).open("ab") as log:
            offset_bytes = log.tell()
            process = subprocess.Popen(
                [*serve_command(definition, node), *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",  # a daemon holds no file system busy but its own
                env=_environment(),
                start_new_session=True,
            )
    except FileNotFoundError:
        raise MissingError(f"{node.directory}: node {node.name} has no directory", hint=hint) from None
    except OSError as error:
        raise StorageError(f"{node.directory / LOG_NAME}: {error.strerror}") from None
    with contextlib.suppress(OSError):
        (node.directory / PID_NAME).write_text(f"{process.pid}\n")
    return Started(node, process, offset_bytes)


def serve_command(definition: Definition, node: Node) -> list[str]:
    """What runs a node."""
    return [sys.executable, "-P", "-m", "blockrepl.cli.main", "serve", str(definition.path), "--node", node.name]


def _environment() -> dict[str, str]:
    """Ours, with the package found from any directory."""
    inherited = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    source = str(Path(blockrepl.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([source, *inherited]))}


def wait_ready(started: Started, deadline_s: float) -> None:
    """Return when the node says it is ready. Raises BlockreplError with the end of its log when it ended before.

    ``deadline_s`` is on the monotonic clock.
    """
    node, state = started.node, "starting"
    while True:
        code = started.process.poll() if started.process is not None else None
        if code is not None:
            raise _ended(started, code)
        try:
            answer = call(node.directory, "status", timeout_s=max(0.1, deadline_s - time.monotonic()))
            if answer.get("ready") is True:
                return
            state = ": ".join(str(answer[key]) for key in ("state", "reason") if answer.get(key))
            if answer.get("state") in HOPELESS:
                raise HOPELESS[answer["state"]](
                    f"node {node.name} runs, but will not become ready ({state})",
                    hint=f"its log is {node.directory / LOG_NAME}; `blockrepl down` stops it",
                )
        except NotRunningError:
            if started.process is None and pid_of(node) is None:
                raise
        except TimeoutExpiredError:
            pass
        if time.monotonic() >= deadline_s:
            raise TimeoutExpiredError(
                f"node {node.name} runs, but is not ready yet ({state})",
                hint=f"watch it with `blockrepl status`; its log is {node.directory / LOG_NAME}",
            )
        time.sleep(POLL_S)


def wait_answers(started: Started, deadline_s: float) -> None:
    """Return when the node answers, whether it is ready or not. Raises BlockreplError."""
    while True:
        code = started.process.poll() if started.process is not None else None
        if code is not None:
            raise _ended(started, code)
        with contextlib.suppress(NotRunningError, TimeoutExpiredError):
            call(started.node.directory, "status", timeout_s=max(0.1, deadline_s - time.monotonic()))
            return
        if time.monotonic() >= deadline_s:
            raise TimeoutExpiredError(f"node {started.node.name} runs, but does not answer")
        time.sleep(POLL_S)


def _ended(started: Started, code: int) -> BlockreplError:
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    path = started.node.directory / LOG_NAME
    lines = log_tail(path, started.log_offset_bytes)
    error = BlockreplError(
        "\n".join([f"node {started.node.name} did not start: {how}", *(f"  {line}" for line in lines)]),
        hint=f"its whole log is {path}",
    )
    if 0 < code < 126:
        error.exit_code = code
    return error


def log_tail(path: Path, offset_bytes: int = 0) -> list[str]:
    """The last lines of a log that were written from ``offset_bytes`` on."""
    try:
        with path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(offset_bytes, end - (1 << 16)))
            return log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []


def pid_of(node: Node) -> int | None:
    """The process that serves the node's directory, or None.

    The kernel knows who listens on the control socket, even if that process is stopped; the pid file is only asked when
    nobody listens, and believed only if that process is this node.
    """
    with contextlib.suppress(BlockreplError), connect(node.directory, 1.0) as sock:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", raw)[0]) or None
    with contextlib.suppress(OSError, ValueError):
        pid = int((node.directory / PID_NAME).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"serve" in words and b"blockrepl.cli.main" in words and node.name.encode() in words:
            return pid
    return None


def stop(node: Node, timeout_s: float) -> str | None:
    """Stop the node's process. Returns how, None when it did not run. Raises TimeoutExpiredError if it survives."""
    pid = pid_of(node)
    if pid is None:
        _remove_pid_file(node)
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        how = _stop(node, pidfd, timeout_s)
    finally:
        os.close(pidfd)
    _remove_pid_file(node)
    return how


def _stop(node: Node, pidfd: int, timeout_s: float) -> str:
    began_s = time.monotonic()
    why = f"it did not stop within {timeout_s:g} s"
    try:
        call(node.directory, "stop", timeout_s=timeout_s)
    except NotRunningError:
        why = "its control socket does not answer"
    except BlockreplError as error:
        why = str(error)
    else:
        if _gone(pidfd, timeout_s - (time.monotonic() - began_s)):
            return "stopped"
    for number, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        if _gone(pidfd, wait_s):
            return f"ended by {number.name}: {why}"
    raise TimeoutExpiredError(f"node {node.name} survives even SIGKILL: it waits for its disk", hint="try `down` again")


def _gone(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


def _remove_pid_file(node: Node) -> None:
    with contextlib.suppress(OSError):
        (node.directory / PID_NAME).unlink()
