"""The paths of one disk over iSCSI, before and after the primary site is gone, with QEMU's initiator."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

from blockrepl.cli.client import call
from blockrepl.definition import load
from scripts.ports import free_ports
from tests.system.conftest import MakeGroup
from tests.system.group import TIMEOUT_S, RealGroup, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("qemu-io") is None or shutil.which("iscsi-inq") is None, reason="needs initiators"),
]


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return done.stdout + done.stderr


def with_portals(group: RealGroup) -> RealGroup:
    text = group.path.read_text()
    for name, port in zip(("p1", "p2", "s1", "s2"), free_ports(4), strict=True):
        text = text.replace(f'name = "{name}"', f'name = "{name}"\niscsi = "127.0.0.1:{port}"')
    group.path.write_text(text)
    group.definition = load(group.path)
    return group


def path_of(group: RealGroup, node: str, volume: str) -> dict[str, Any]:
    status = call(group.node(node).directory, "status", {}, timeout_s=TIMEOUT_S)
    found: dict[str, Any] = next(v for v in status["volumes"] if v["name"] == volume)["iscsi"]
    return found


def test_the_secondary_site_publishes_the_same_disk_and_its_path_works_after_a_takeover(make_group: MakeGroup) -> None:
    group = with_portals(make_group()).create().start()
    ours, theirs = path_of(group, "p1", "data"), path_of(group, "s1", "data")
    assert (ours["state"], theirs["state"], ours["lun"]) == ("active/optimized", "standby", theirs["lun"])
    assert "wrote" in run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 3M", ours["url"])
    serial = run("iscsi-inq", "-e", "1", "-c", "128", ours["url"])
    assert "Serial" in serial
    assert "0x040b" in run("qemu-io", "-f", "raw", "-c", "read 1M 4k", theirs["url"])  # standby
    group.kill("p1", "p2")
    group.takeover()
    wait_for(lambda: path_of(group, "s1", "data")["state"] == "active/optimized", "the path is active")
    out = run(
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "read -P 7 1M 3M",
        "-c",
        "write -P 9 0 64k",
        "-c",
        "read -P 9 0 64k",
        theirs["url"],
    )
    assert out.count("read ") == 2, out
    assert "verification failed" not in out
    assert run("iscsi-inq", "-e", "1", "-c", "128", theirs["url"]) == serial
