"""The target of a node: which units it publishes in which state, who may log in, where secrets come from."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from uuid import UUID

import pytest

from blockrepl.block import Volume
from blockrepl.chunks import ChunkPool
from blockrepl.definition import Definition, load
from blockrepl.errors import UsageError
from blockrepl.formats.image import Side
from blockrepl.frontends.iscsi.scsi.unit import PathState
from blockrepl.node.iscsi_exports import IscsiExports, read_secret
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.image import ImageFile, ImageIdentity
from blockrepl.storage.plain import PlainVolume

GROUP = """
[group]
name = "g"
{iscsi}
[[node]]
name = "p"
role = "primary"
directory = "p"
iscsi = "127.0.0.1:{0}"
[[node]]
name = "i"
role = "intermediate"
directory = "i"
listen = "127.0.0.1:{1}"
[[node]]
name = "s"
role = "secondary"
directory = "s"
listen = "127.0.0.1:{2}"
iscsi = "127.0.0.1:{3}"
[[volume]]
name = "data"
size = "1MiB"
primary = "p"
secondary = "s"
[[volume]]
name = "plain"
size = "1MiB"
primary = "p"
secondary = "none"
[[volume]]
name = "other"
size = "1MiB"
primary = "p"
secondary = "none"
frontends = ["nbd"]
"""
PORTS = count(7300)


def definition(directory: Path, iscsi: str = "") -> Definition:
    path = directory / "g.toml"
    path.write_text(GROUP.format(*(next(PORTS) for _ in range(4)), iscsi=iscsi))
    return load(path)


class Rig:
    """The target of one node, and plain volumes to serve."""

    def __init__(self, directory: Path, node: str, iscsi: str = "") -> None:
        self.definition = definition(directory, iscsi)
        self.exports = IscsiExports(self.definition, self.definition.node(node), ChunkPool())
        self.disk = DiskThread(asyncio.get_running_loop(), "disk")
        self.images: list[ImageFile] = []
        self._directory = directory

    def volume(self, name: str) -> Volume:
        identity = ImageIdentity(UUID(int=7), len(self.images), 2, Side.PRIMARY, 1 << 20, 4096)
        path = self._directory / f"{name}.img"
        ImageFile.create(path, identity)
        self.images.append(ImageFile.open(path, identity))
        return PlainVolume(name, self.images[-1], self.disk)

    def close(self) -> None:
        self.disk.close()
        for image in self.images:
            image.close()

    def state(self, name: str) -> str:
        entry = self.exports.entry(name)
        assert entry is not None
        return str(entry["state"])


async def test_a_primary_is_unavailable_until_it_serves_and_when_it_failed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "p")
    rig.exports.settle({}, failed=False, following=False)
    assert (rig.state("data"), rig.state("plain")) == ("unavailable", "unavailable")
    served = {"data": rig.volume("data"), "plain": rig.volume("plain"), "other": rig.volume("other")}
    rig.exports.settle(served, failed=False, following=False)
    assert (rig.state("data"), rig.state("plain")) == ("active/optimized", "active/optimized")
    rig.exports.settle(served, failed=True, following=False)
    assert (rig.state("data"), rig.state("plain")) == ("unavailable", "active/optimized")
    rig.close()


async def test_a_secondary_stands_by_until_it_has_taken_over(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "s")
    rig.exports.settle({}, failed=False, following=True)
    assert rig.state("data") == "standby"
    assert rig.exports.entry("plain") is None
    rig.exports.settle({"data": rig.volume("data")}, failed=False, following=True)
    assert rig.state("data") == "active/optimized"
    rig.exports.settle({}, failed=True, following=True)
    assert rig.state("data") == "unavailable"
    rig.close()


async def test_both_sites_publish_the_same_disk_and_know_of_each_other(tmp_path: Path) -> None:
    primary, secondary = Rig(tmp_path, "p"), Rig(tmp_path, "s")
    units = [rig.exports.units()["data"] for rig in (primary, secondary)]
    assert units[0].identity.naa == units[1].identity.naa
    assert units[0].identity.serial == units[1].identity.serial
    assert units[0].lun == units[1].lun == 0
    primary.exports.settle({"data": primary.volume("data")}, failed=False, following=False)
    secondary.exports.settle({}, failed=False, following=True)
    assert units[0].other_paths == {3: PathState.STANDBY}
    assert units[1].other_paths == {1: PathState.ACTIVE_OPTIMIZED}
    secondary.exports.settle({"data": secondary.volume("copy")}, failed=False, following=True)
    assert units[1].other_paths == {1: PathState.UNAVAILABLE}
    primary.close()
    secondary.close()


async def test_a_volume_without_the_front_end_is_not_published(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "p")
    assert rig.exports.entry("other") is None
    assert rig.exports.units().keys() == {"data", "plain"}
    rig.close()


def test_a_secret_is_the_first_line_of_a_file_of_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"a secret of 20 bytes\r\nrest")
    path.chmod(0o600)
    assert read_secret(path) == b"a secret of 20 bytes"


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"a secret of 20 bytes", 0o640, "others may read"),
        (b"a secret of 20 bytes", 0o604, "others may read"),
        (b"eleven byte", 0o600, "12 to 255 bytes, this has 11"),
        (b"x" * 256, 0o600, "12 to 255 bytes"),
        (None, 0, "cannot be read"),
    ],
)
def test_a_secret_that_is_none_is_refused_without_being_shown(
    tmp_path: Path, content: bytes | None, mode: int, words: str
) -> None:
    path = tmp_path / "s"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(UsageError, match=words) as caught:
        read_secret(path)
    assert content is None or content.decode() not in str(caught.value) + caught.value.hint


async def test_the_target_has_no_secret_of_a_user(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("the same secret\n")
        (tmp_path / name).chmod(0o600)
    chap = '[iscsi.chap]\nusers = [{name = "h", secret_file = "a"}]\nmutual = {name = "t", secret_file = "b"}\n'
    with pytest.raises(UsageError, match="the target has the secret of a user"):
        Rig(tmp_path, "p", chap)
