"""The long line of the demo: everything arrives, in order; and what is on the way dies with it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.patience import patient

ROOT = Path(__file__).parents[2]
TIMEOUT_S = patient(60)


@contextmanager
def line_to(port: int, delay_s: float) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen_port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "tests.demo.slow_line", str(listen_port), str(port), str(delay_s)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield process, listen_port
        finally:
            process.kill()


@pytest.fixture
def far_end() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)
        yield server


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(1 << 16):
        data += piece
    return data


def test_bytes_arrive_in_order_in_both_directions(far_end: socket.socket) -> None:
    sent = b"".join(bytes([number]) * 100_000 for number in range(50))
    with (
        line_to(far_end.getsockname()[1], 0.01) as (_, port),
        socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as near,
    ):
        far, _ = far_end.accept()
        far.sendall(b"hello")
        assert near.recv(5, socket.MSG_WAITALL) == b"hello"
        near.sendall(sent)
        near.shutdown(socket.SHUT_WR)
        assert read_all(far) == sent
        far.close()


def test_what_is_on_the_way_does_not_arrive_when_the_line_is_killed(far_end: socket.socket) -> None:
    with (
        line_to(far_end.getsockname()[1], 3600.0) as (process, port),
        socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as near,
    ):
        far, _ = far_end.accept()
        far.sendall(b"hello")
        assert near.recv(5, socket.MSG_WAITALL) == b"hello"  # so the line carries
        near.sendall(b"lost")
        process.kill()
        assert read_all(far) == b""
        far.close()


def test_a_line_whose_starter_was_killed_ends(far_end: socket.socket) -> None:
    """It is to be in nobody's way after a demo that got SIGKILL."""
    port = str(far_end.getsockname()[1])
    start = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", start, sys.executable, "-m", "tests.demo.slow_line", "0", port, "0"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert starter.stdout.readline() == "listening\n"
        starter.kill()
        assert starter.stdout.read() == "", "the line holds the pipe until it ends"
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
