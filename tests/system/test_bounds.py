"""Nothing grows without limit: a stopped secondary, full load, silent connections, a large volume."""

from __future__ import annotations

import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.patience import patient
from tests.system.conftest import MakeGroup
from tests.system.group import (
    ALL,
    MEMORY_LIMIT_BYTES,
    MIB,
    SECONDARIES,
    TIMEOUT_S,
    A,
    B,
    RealGroup,
    peak_memory_bytes,
    read_bytes,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SILENT = 1000


class Flood:
    """Writes 64 KiB blocks to both volumes, round and round, until it is told to stop."""

    block_bytes = 64 << 10

    def __init__(self, group: RealGroup) -> None:
        self.writes = {A: 0, B: 0}
        self.errors: list[OSError] = []
        self._group = group
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(name,), daemon=True) for name in self.writes]
        for thread in self._threads:
            thread.start()

    def _run(self, name: str) -> None:
        try:
            volume = self._group.open(name, timeout_s=patient(600))
            places = volume.size_bytes // self.block_bytes
            while not self._stop.is_set():
                count = self.writes[name]
                payload = count.to_bytes(8, "big") * (self.block_bytes // 8)
                volume.write(count % places * self.block_bytes, payload)
                self.writes[name] += 1
            volume.close()
        except OSError as error:
            self.errors.append(error)

    @property
    def total(self) -> int:
        return sum(self.writes.values())

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        assert self.errors == []


def stands_still(flood: Flood, group: RealGroup) -> bool:
    """No write was completed and no number given over more than a round, a heartbeat and a checkpoint."""
    before = flood.total, group.marks("i1")["numbered"]
    time.sleep(2.5)  # an observation, not a synchronisation: the caller repeats it until it holds
    return (flood.total, group.marks("i1")["numbered"]) == before


def fullness(group: RealGroup) -> float:
    """Of the intermediate's ring."""
    journal = group.status("i1")["journal"]
    return float(journal["used_bytes"] / journal["size_bytes"])


@pytest.mark.parametrize("secondary", SECONDARIES)
def test_a_stopped_secondary_holds_the_hosts_back_when_the_journal_is_full_and_nothing_grows(
    make_group: MakeGroup, secondary: str
) -> None:
    rings = {"journal": "32MiB", "secondary_journal": "32MiB", "keys": 'on_full = "block"'}
    group = make_group(**rings, policy=f"hold_s = {patient(600.0)}").create().start()
    flood = Flood(group)
    wait_for(lambda: flood.total > 50, "a load")
    group.signal(secondary, signal.SIGSTOP)
    wait_for(lambda: stands_still(flood, group) and fullness(group) > 1 / 4, "a full journal holds the hosts")
    held = flood.total
    journal = group.status("i1")["journal"]
    assert journal["used_bytes"] <= journal["size_bytes"]
    assert {name: peak_memory_bytes(group.pid(name)) < MEMORY_LIMIT_BYTES for name in ALL} == dict.fromkeys(ALL, True)
    group.signal(secondary, signal.SIGCONT)
    wait_for(lambda: flood.total > held + 100, "the hosts go on")
    flood.stop()
    group.settle()
    assert group.differing() == []


@pytest.mark.usefixtures("fio")
@pytest.mark.parametrize("load", [("--bs=4k", "--iodepth=128"), ("--bs=1M", "--iodepth=16")], ids=["4k", "1m"])
def test_memory_stays_below_the_limit_under_full_load_and_the_lag_falls_to_zero(
    make_group: MakeGroup, load: tuple[str, str]
) -> None:
    group = make_group(journal="128MiB", secondary_journal="128MiB").create().start()
    fio = group.fio("--rw=randwrite", "--size=64M", "--time_based", "--runtime=4", *load)
    output, _ = fio.communicate(timeout=2 * TIMEOUT_S)
    assert fio.returncode == 0, output
    group.settle()
    wait_for(lambda: lags(group) == [0, 0], "no lag any more")
    peaks = {name: peak_memory_bytes(group.pid(name)) for name in ALL}
    assert all(peak < MEMORY_LIMIT_BYTES for peak in peaks.values()), peaks
    assert group.differing() == []


def lags(group: RealGroup) -> list[int]:
    return [peer["lag_writes"] for peer in group.status("i1")["peers"] if peer["node"] in SECONDARIES]


@pytest.fixture
def many_files() -> Iterator[None]:
    """Nodes are started with the 1024 descriptors that Debian gives; this process takes what it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3 * SILENT:
        pytest.skip(f"only {hard} descriptors may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_silent_connections_harm_nobody(make_group: MakeGroup) -> None:
    group = make_group().create().start()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    p1, i1, s1 = (group.node(name) for name in ("p1", "i1", "s1"))
    assert p1.nbd is not None
    volume = group.open(A)
    for address in (p1.nbd, i1.address, s1.address):
        silent = [socket.create_connection((address.host, address.port), TIMEOUT_S) for _ in range(SILENT)]
        for number in range(5):
            volume.write(number * 4096, bytes([number]) * 4096, durable=True)
        other = group.open(A)
        assert other.read(4096, 4096) == b"\x01" * 4096
        other.close()
        assert all(group.status(name)["ready"] for name in ALL)
        for sock in silent:
            sock.close()
    volume.close()
    group.settle()
    assert {name: peak_memory_bytes(group.pid(name)) < MEMORY_LIMIT_BYTES for name in ALL} == dict.fromkeys(ALL, True)


def read_while_recovering(group: RealGroup) -> dict[str, int]:
    """Write the same, kill every node, start them: what each read until it was ready."""
    volume = group.open(A)
    for number in range(64):
        volume.write(number * MIB, bytes([number]) * (64 << 10))
    volume.flush()
    volume.write(volume.size_bytes - 4096, b"\xff" * 4096, durable=True)
    volume.close()
    group.settle()
    group.kill(*ALL)
    group.start()
    read = {name: read_bytes(group.pid(name)) for name in ALL}
    volume = group.open(A)
    assert volume.read(volume.size_bytes - 4096, 4096) == b"\xff" * 4096
    volume.close()
    return read


def test_recovery_after_kill_9_reads_no_more_for_a_volume_of_64_gib(make_group: MakeGroup) -> None:
    small = read_while_recovering(make_group(sizes={A: "64MiB"}).create().start())
    large_group = make_group(sizes={A: "64GiB"}).create().start()
    large = read_while_recovering(large_group)
    assert large_group.images(A)[0].stat().st_size == 64 << 30
    assert large_group.images(A)[0].stat().st_blocks * 512 < 64 * MIB
    excess = {name: large[name] - small[name] for name in ALL}
    assert all(each < 24 * MIB for each in excess.values()), (small, large)
