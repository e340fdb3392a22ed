"""Ports for servers: never those of outgoing connections, never another process's."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from scripts.ports import BLOCK_PORTS, FIRST_PORT, Ports, free_ports

ROOT = Path(__file__).parent.parent
OTHER = "from scripts.ports import free_ports; print(*(free_ports(1)[0] for _ in range(100)), flush=True); input()"


def test_ports_lie_below_those_of_outgoing_connections() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(FIRST_PORT <= port < max(lowest, FIRST_PORT + BLOCK_PORTS) for port in free_ports(20))


def test_processes_beside_each_other_never_get_the_same_port() -> None:
    ours = {free_ports(1)[0] for _ in range(100)}
    others = [
        subprocess.Popen([sys.executable, "-c", OTHER], cwd=ROOT, text=True, stdin=-1, stdout=-1) for _ in range(3)
    ]
    given = []
    for other in others:
        assert other.stdout is not None
        given.append({int(port) for port in other.stdout.readline().split()})
    for other in others:
        other.communicate("\n")
    assert [len(each) for each in given] == [100] * 3
    assert len(ours.union(*given)) == len(ours) + 300


def test_a_port_comes_again_only_after_all_others() -> None:
    ports = Ports()
    given = [ports.take()[0]]
    while (port := ports.take()[0]) not in given:
        given.append(port)
    assert port <= given[0] + BLOCK_PORTS // 2  # the first of those that are free now
    assert len(given) > BLOCK_PORTS // 2  # others may use some


def test_a_port_that_somebody_listens_at_is_left_out() -> None:
    ports = Ports()
    taken = ports.take(4)[3]
    with socket.create_server(("127.0.0.1", taken)):
        assert taken not in [port for _ in range(BLOCK_PORTS // 4) for port in ports.take(4)]
