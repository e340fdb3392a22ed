"""The kernel's own iSCSI initiator (open-iscsi): authenticated both ways, through the loss of a site."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.iscsi.groups import portals
from tests.lab.guest import HOST, Guest
from tests.system.conftest import MakeGroup
from tests.system.group import RealGroup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILES = 8
USER, SECRET = "lab", "a secret of the lab"
US, OURS = "blockrepl", "what the target says"
CHAP = f"""
[iscsi.chap]
users = [{{ name = "{USER}", secret_file = "user.secret" }}]
mutual = {{ name = "{US}", secret_file = "mutual.secret" }}
"""


def with_secrets(folder: Path) -> None:
    for name, secret in (("user", SECRET), ("mutual", OURS)):
        path = folder / f"{name}.secret"
        path.touch(0o600)
        path.write_text(secret + "\n")


class Session:
    """The guest's session with one node."""

    def __init__(self, guest: Guest, group: RealGroup, node: str, *, secret: str = SECRET) -> None:
        self.guest = guest
        port = portals(group, node)[0][1]
        self._portal = f"{HOST}:{port}"
        self._node = f"iscsiadm -m node -T {group.definition.target_name} -p {self._portal}"
        settings = {
            "authmethod": "CHAP", "username": USER, "password": secret, "username_in": US, "password_in": OURS,
            "chap_algs": "SHA3-256,SHA256",
        }  # fmt: skip
        updates = "".join(
            f"{self._node} -o update -n node.session.auth.{name} -v '{value}' && " for name, value in settings.items()
        )
        guest.run(f"pidof iscsid >/dev/null || iscsid; {self._node} -o new && {updates} true")

    def login(self) -> tuple[int, str]:
        return self.guest.attempt(f"{self._node} --login")

    def forget(self) -> None:
        self.guest.attempt(f"{self._node} --logout; {self._node} -o delete")

    def disk(self, lun: int) -> str:
        """The block device of a LUN of this session; waits until it has a size."""
        found = self.guest.run(
            f"""
            tries=0
            while [ $tries -lt 300 ]; do
                for session in /sys/class/iscsi_session/session*; do
                    port=$(cat $session/device/connection*/iscsi_connection/*/persistent_port)
                    [ "$port" = {self._portal.rpartition(":")[2]} ] || continue
                    for disk in $session/device/target*/*:{lun}/block/*; do
                        [ "$(cat $disk/size 2>/dev/null || echo 0)" = 0 ] || {{ basename $disk; exit 0; }}
                    done
                done
                tries=$((tries + 1))
                usleep 100000
            done
            ls -R /sys/class/iscsi_session; cat /proc/partitions; dmesg | tail; exit 1
            """
        )
        return f"/dev/{found.strip()}"

    def identity(self, disk: str) -> str:
        return self.guest.run(f"cat /sys/block/{Path(disk).name}/device/wwid").strip()


def test_a_file_system_survives_the_loss_of_the_primary_site(guest: Guest, make_group: MakeGroup) -> None:
    group = make_group(iscsi_portals=1, more=CHAP)
    with_secrets(group.folder)
    group.create().start()

    wrong = Session(guest, group, "p1", secret="not what was agreed")
    status, said = wrong.login()
    assert status, said
    wrong.forget()

    here = Session(guest, group, "p1")
    status, said = here.login()
    assert status == 0, said
    disk = here.disk(0)
    identity = here.identity(disk)
    assert identity  # from page 83h; the kernel takes which it likes best
    guest.run(f"mkfs.ext4 -q {disk} && mkdir -p /mnt/a && mount {disk} /mnt/a")
    guest.run(
        f"i=0; while [ $i -lt {FILES} ]; do dd if=/dev/urandom of=/mnt/a/f$i bs=64k count=8; i=$((i+1)); done 2>&1\n"
        "cd /mnt/a && md5sum f* >/tmp/sums && sync"
    )

    group.kill("p1", "p2")
    guest.attempt("cd /; umount -l /mnt/a")
    done = group.cli("takeover", "system", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)

    there = Session(guest, group, "s1")
    status, said = there.login()
    assert status == 0, said
    disk = there.disk(0)
    assert there.identity(disk) == identity
    guest.run(f"e2fsck -fp {disk} || [ $? -eq 1 ]")  # 1: the journal was replayed
    guest.run(f"e2fsck -fn {disk} && mount {disk} /mnt/a && cd /mnt/a && md5sum -c /tmp/sums")
    guest.run(f"dd if=/dev/urandom of=/mnt/a/more bs=64k count=8 2>&1 && umount /mnt/a && e2fsck -fn {disk}")
    there.forget()
    here.forget()
