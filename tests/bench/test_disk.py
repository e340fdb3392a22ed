from __future__ import annotations

from pathlib import Path

import pytest

from scripts.benchlib.disk import measure, percentile
from scripts.benchlib.works import KIB, WORKS
from scripts.benchlib.workspace import file_system, write_image


@pytest.mark.parametrize("name", ["randwrite-4k-qd1", "randwrite-4k-qd32", "write-1m-qd8"])
def test_groups_are_whole_and_stay_inside_the_file(tmp_path: Path, name: str) -> None:
    path, work, size_bytes = tmp_path / "image", WORKS[name], 4096 * KIB
    write_image(path, size_bytes)
    sample = measure(work, path, 0.01)
    assert sample.ops >= work.depth
    assert sample.ops % work.depth == 0
    assert sample.bytes == sample.ops * work.block_bytes
    assert path.stat().st_size == size_bytes


def test_image_of_any_size_is_written_to_its_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_image(path, 2560 * KIB)
    status = path.stat()
    assert status.st_size == 2560 * KIB
    assert status.st_blocks * 512 >= status.st_size, "a hole would measure allocation"


def test_percentiles() -> None:
    values = [float(value) for value in range(101)]
    assert (percentile(values, 50), percentile(values, 99)) == (50.0, 99.0)
    assert percentile([7.0], 99) == 7.0


def test_file_system_is_that_of_the_nearest_and_newest_mount() -> None:
    mounts = """\
21 1 8:1 / / rw - ext4 /dev/a rw
22 21 8:2 / /srv rw shared:1 - ext4 /dev/b rw
23 21 0:5 / /srv rw - xfs /dev/c rw
24 23 0:6 / /srv/run rw - tmpfs none rw"""
    assert file_system(Path("/srv/run/x"), mounts) == "tmpfs"
    assert file_system(Path("/srv/runner"), mounts) == "xfs"
    assert file_system(Path("/home"), mounts) == "ext4"
