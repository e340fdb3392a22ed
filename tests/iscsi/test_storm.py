"""A real node under ill-meaning initiators: it lives, stays small, and serves those who mean well."""

from __future__ import annotations

import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any

import pytest

from tests.iscsi import pdu
from tests.iscsi.groups import PLAIN_NODE, PlainGroup, portals
from tests.iscsi.initiator import NAME, Answer, ConnectionEndedError, Initiator, read_10, write_10
from tests.patience import patient
from tests.system.group import MIB, TIMEOUT_S, peak_memory_bytes, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CASES = 1500
CONNECTIONS = 1000
LUN = 1  # of those who mean well; the others are at all the rest
PATIENCE_S = patient(5.0)  # a command that another initiator's reset has ended is never answered
MEMORY_LIMIT_BYTES = 250 * MIB
GROWTH_LIMIT_BYTES = 48 * MIB  # of a thousand connections: a few KiB of ours each, and a socket


def connect(group: PlainGroup) -> socket.socket:
    return socket.create_connection(portals(group, PLAIN_NODE)[0], TIMEOUT_S)


def honest(group: PlainGroup, name: str = NAME) -> Initiator:
    initiator = Initiator(portals(group, PLAIN_NODE)[0], name=name)
    initiator.login(group.definition.target_name, HeaderDigest="CRC32C", DataDigest="CRC32C")
    initiator.ready(LUN)
    return initiator


def write_and_read(initiator: Initiator, block: int, data: bytes) -> None:
    blocks = len(data) // 512
    assert insist(initiator, write_10(block, blocks), data=data).good
    assert insist(initiator, read_10(block, blocks), expected_in=len(data)).data == data


def insist(initiator: Initiator, cdb: bytes, **more: Any) -> Answer:
    """A command again until no unit attention is in its way: others may reset the target."""
    for _ in range(8):
        answer = initiator.command(cdb, lun=LUN, timeout_s=PATIENCE_S, **more)
        if answer.sense >> 16 != 6:
            break
    return answer


def assert_clean(group: PlainGroup) -> None:
    log = group.log(PLAIN_NODE)
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]
    assert "mistake of ours" not in log


def test_storm_of_bad_pdus_leaves_the_node_and_other_sessions_as_they_were(plain: PlainGroup) -> None:
    host, port = portals(plain, PLAIN_NODE)[0]
    argv = [sys.executable, "-m", "tests.iscsi.storm", host, str(port), plain.definition.target_name]
    storm = plain.run([*argv, "--cases", str(CASES)])
    random, served, initiator = Random(1), 0, None
    while storm.poll() is None:
        try:
            initiator = initiator or honest(plain)
            data = random.randbytes(512 * random.choice((1, 8, 64, 600)))
            write_and_read(initiator, 3000 + random.randrange(1000), data)
            served += 1
        except (ConnectionEndedError, TimeoutError):  # a cold reset ends every session, other resets only commands
            if initiator is not None:
                initiator.socket.close()
            initiator = None
    assert storm.stdout is not None
    assert storm.stdout.read().strip() == str(CASES)
    assert served > 20
    assert peak_memory_bytes(plain.pid(PLAIN_NODE)) < MEMORY_LIMIT_BYTES
    with honest(plain) as late:
        write_and_read(late, 0, b"still here " * 512)
    assert_clean(plain)


@contextmanager
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < CONNECTIONS + 100:
        pytest.skip(f"this process may have {before[1]} open files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], CONNECTIONS + 100), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("said", ["nothing", "half a header", "a login that goes on"])
def test_a_thousand_connections_cost_little_and_are_closed_in_time(plain: PlainGroup, said: str) -> None:
    first = pdu.login(pdu.keys(InitiatorName=NAME), more=True, following=None)
    content = {"nothing": b"", "half a header": first[:20], "a login that goes on": first}[said]
    with many_files(), ExitStack() as stack:
        initiator = stack.enter_context(honest(plain))
        before = peak_memory_bytes(plain.pid(PLAIN_NODE))
        sockets = [stack.enter_context(connect(plain)) for _ in range(CONNECTIONS)]
        for each in sockets:
            each.sendall(content)
        write_and_read(initiator, 7, b"meanwhile" * 512)
        with honest(plain, f"{NAME}-another") as another:
            write_and_read(another, 8, b"a newcomer too" * 256)
        assert peak_memory_bytes(plain.pid(PLAIN_NODE)) - before < GROWTH_LIMIT_BYTES

        def all_closed() -> bool:
            return all(is_closed(each) for each in sockets)

        wait_for(all_closed, "silent connections are closed")
        write_and_read(initiator, 9, b"and afterwards" * 512)
    assert_clean(plain)


def is_closed(each: socket.socket) -> bool:
    each.setblocking(False)
    try:
        while each.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True
