"""The kernel's NBD client."""

from __future__ import annotations

import pytest

from tests.lab.guest import HOST, Guest
from tests.system.conftest import MakeGroup
from tests.system.group import VOLUMES, RealGroup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILES = 8


def connect(group: RealGroup, volume: str, *, secondary: bool = False) -> str:
    node = group.node(VOLUMES[volume][1 if secondary else 0])
    assert node.nbd is not None
    port = str(node.nbd).rpartition(":")[2]
    return f"nbd-client {HOST} {port} /dev/nbd0 -N {volume} -b {group.definition.group.block_size}"


def test_a_file_system_of_the_kernels_nbd_client_survives_a_takeover(guest: Guest, make_group: MakeGroup) -> None:
    group = make_group().create().start()
    guest.run(connect(group, "data"))
    guest.run("mkfs.ext4 -q /dev/nbd0 && mkdir -p /mnt/a && mount /dev/nbd0 /mnt/a")
    guest.run(
        f"i=0; while [ $i -lt {FILES} ]; do dd if=/dev/urandom of=/mnt/a/f$i bs=64k count=8; i=$((i+1)); done 2>&1\n"
        "cd /mnt/a && md5sum f* >/tmp/sums && sync"
    )
    group.kill("p1", "p2")
    guest.attempt("cd /; umount /mnt/a; nbd-client -d /dev/nbd0")
    group.takeover()
    guest.run(connect(group, "data", secondary=True))
    guest.run("e2fsck -fp /dev/nbd0 || [ $? -eq 1 ]")  # 1: the journal was replayed
    guest.run("e2fsck -fn /dev/nbd0 && mount /dev/nbd0 /mnt/a && cd /mnt/a && md5sum -c /tmp/sums")
    guest.run("dd if=/dev/urandom of=/mnt/a/more bs=64k count=8 && umount /mnt/a && e2fsck -fn /dev/nbd0")
    guest.run("nbd-client -d /dev/nbd0")
