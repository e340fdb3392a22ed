"""TCP ports of loopback for the servers of tests and scripts.

They lie below those that the kernel gives to outgoing connections: else the port of a killed node could be taken by
somebody's connection before the node starts again. Each process has a block of its own, held by an abstract Unix
socket of the block's name, which the kernel frees at the end of the process, whatever that is; so any number of tests,
demos and benchmarks may run beside each other.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path

FIRST_PORT = 12_000  # above those of targets/*.toml
LAST_PORT = 32_767  # below Linux's default of outgoing ports
BLOCK_PORTS = 320
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class NoPortsError(Exception):
    """Too many processes hold ports, or too many ports are in use."""


class Ports:
    """A process's block of ports; they are given in turn, so one comes again only after all others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claim: socket.socket | None = None
        self._first = self._next = 0

    def take(self, count: int = 1) -> list[int]:
        """Ports that nobody listens at now, one above the other."""
        with self._lock:
            if self._claim is None:
                self._claim, self._first = _claim()
                self._next = self._first
            for _ in range(2 * BLOCK_PORTS):
                if self._next + count > self._first + BLOCK_PORTS:
                    self._next = self._first
                found = list(range(self._next, self._next + count))
                self._next += count
                if all(map(_free, found)):
                    return found
        raise NoPortsError(f"no {count} free ports in a row from {self._first} on")


def _claim() -> tuple[socket.socket, int]:
    """A block that no other process has: what holds it, and its first port."""
    for first in range(FIRST_PORT, _end() - BLOCK_PORTS + 1, BLOCK_PORTS):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0blockrepl-ports-{first}")
        except OSError:
            claim.close()
            continue
        return claim, first
    raise NoPortsError(f"other processes hold all ports from {FIRST_PORT} to {_end()}")


def _end() -> int:
    """Where outgoing ports begin; the usual place where they leave no room below."""
    try:
        lowest = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError):
        return LAST_PORT + 1
    return min(lowest, LAST_PORT + 1) if lowest > FIRST_PORT + 8 * BLOCK_PORTS else LAST_PORT + 1


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what lingers is in nobody's way
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


_OURS = Ports()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now, one above the other."""
    return _OURS.take(count)


def free_port() -> int:
    """A port that nobody listens at now."""
    return _OURS.take()[0]
