"""Persistent reservations outlive a killed primary, and go with the disk to the secondary site."""

from __future__ import annotations

import contextlib
import socket
from urllib.parse import urlsplit

import pytest

from blockrepl.formats import iscsi
from blockrepl.formats.scsi_reservation import OutAction, Type
from tests.frontends.iscsi.initiator import login_bytes
from tests.frontends.iscsi.scsi.test_reservations import out
from tests.system.conftest import MakeGroup
from tests.system.group import TIMEOUT_S, RealGroup, wait_for
from tests.system.test_iscsi_takeover import path_of, with_portals

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HEADER_BYTES = 48
UNIT_ATTENTION = 6


class Host:
    """One session at the first LUN of a URL, one command at a time."""

    def __init__(self, url: str, name: str) -> None:
        parts = urlsplit(url)
        _, target, lun = parts.path.split("/")
        assert parts.hostname is not None
        assert parts.port is not None
        self._lun = int(lun)
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)
        self._cmd_sn = 100
        text = {"InitiatorName": f"iqn.2026-11.test:{name}", "TargetName": target, "SessionType": "Normal"}
        self._socket.sendall(
            login_bytes(b"".join(f"{key}={value}\0".encode() for key, value in text.items()), flags=0x87)
        )
        answer, _ = self._receive()
        assert answer[0] & 0x3F == iscsi.Opcode.LOGIN_RESPONSE
        assert answer[36:38] == b"\0\0"

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            assert piece, "the target hung up"
            data += piece
        return data

    def _receive(self) -> tuple[bytes, bytes]:
        header = self._exactly(HEADER_BYTES)
        size = int.from_bytes(header[5:8], "big")
        return header, self._exactly(size + -size % 4)[:size]

    def send(self, cdb: str, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
        """(status, Data-In or sense data); unit attentions are heard out first."""
        while True:
            status, answer = self._command(bytes.fromhex(cdb), data, room)
            if status != 2 or answer[2 + 2] & 0xF != UNIT_ATTENTION:
                return status, answer

    def _command(self, cdb: bytes, data: bytes, room: int) -> tuple[int, bytes]:
        header = iscsi.scsi_command.build(
            {
                "flags": 0x80 | (0x20 if data else 0) | (0x40 if room else 0), "ahs_words": 0, "data_bytes": len(data),
                "lun": self._lun, "tag": self._cmd_sn, "expected_bytes": len(data) or room, "cmd_sn": self._cmd_sn,
                "exp_stat_sn": 0, "cdb": cdb.ljust(16, b"\0"),
            }
        )  # fmt: skip
        self._cmd_sn += 1
        self._socket.sendall(header + data + bytes(-len(data) % 4))
        found = b""
        while True:
            answer, piece = self._receive()
            kind = answer[0] & 0x3F
            if kind == iscsi.Opcode.DATA_IN:
                found += piece
                if answer[1] & 0x01:
                    return answer[3], found
            elif kind == iscsi.Opcode.SCSI_RESPONSE:
                return answer[3], piece or found


def keys(host: Host) -> list[int]:
    status, data = host.send("5e 00 0000000000 0400 00", room=0x400)
    assert status == 0, data.hex()
    return [int.from_bytes(data[at : at + 8], "big") for at in range(8, len(data), 8)]


def wait_until_active(group: RealGroup, node: str) -> str:
    wait_for(lambda: path_of(group, node, "data")["state"] == "active/optimized", f"{node} serves data")
    url: str = path_of(group, node, "data")["url"]
    return url


def test_reservations_survive_a_killed_primary_and_a_takeover(make_group: MakeGroup) -> None:
    group = with_portals(make_group()).create().start()
    with contextlib.ExitStack() as stack:

        def host(url: str, name: str) -> Host:
            return stack.enter_context(contextlib.closing(Host(url, name)))

        owner = host(wait_until_active(group, "p1"), "owner")
        assert owner.send(*out(OutAction.REGISTER, action_key=0xBEEF))[0] == 0
        assert owner.send(*out(OutAction.RESERVE, Type.WRITE_EXCLUSIVE, 0xBEEF))[0] == 0
        group.kill("p1")
        group.start("p1")
        again = host(wait_until_active(group, "p1"), "stranger")
        assert keys(again) == [0xBEEF]
        assert again.send("2a 00 00000000 00 0001 00", bytes(4096))[0] == 0x18
        group.kill("p1", "p2")
        group.takeover()
        url = wait_until_active(group, "s1")
        owner, stranger = host(url, "owner"), host(url, "stranger")
        assert keys(stranger) == [0xBEEF]
        assert stranger.send("2a 00 00000000 00 0001 00", bytes(4096))[0] == 0x18
        assert owner.send("2a 00 00000000 00 0001 00", bytes(4096))[0] == 0
        assert owner.send(*out(OutAction.CLEAR, key=0xBEEF))[0] == 0
        assert stranger.send("2a 00 00000000 00 0001 00", bytes(4096))[0] == 0
