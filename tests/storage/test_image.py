"""Image files on a real file system."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.errors import (
    DamagedError,
    IdentityError,
    InUseError,
    MissingError,
    NoSpaceError,
    StorageError,
    UsageError,
)
from blockrepl.formats.image import IDENTITY_BYTES, Side
from blockrepl.storage.image import ImageFile, ImageIdentity, identity_path

MIB = 1 << 20
IDENTITY = ImageIdentity(UUID(int=7), 1, 2, Side.PRIMARY, 4 * MIB, 512)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.img"


def made(path: Path, identity: ImageIdentity = IDENTITY) -> ImageFile:
    ImageFile.create(path, identity)
    return ImageFile.open(path, identity)


def batch_of(*commands: tuple[Op, int, int, WriteFlag, bytes | None]) -> WriteBatch:
    batch = WriteBatch(lambda _: None)
    for op, offset, length, flag, payload in commands:
        batch.ops.append(op)
        batch.offsets.append(offset)
        batch.lengths.append(length)
        batch.flags.append(flag)
        batch.cookies.append(0)
        batch.payloads.append(None if payload is None else memoryview(payload))
    return batch


def content(image: ImageFile, offset: int = 0, length: int | None = None) -> bytes:
    data = bytearray(image.size_bytes - offset if length is None else length)
    image.read(offset, memoryview(data))
    return bytes(data)


# identity


@given(
    group=st.uuids(),
    volume=st.integers(0, 2**32 - 1),
    node=st.integers(0, 2**32 - 1),
    side=st.sampled_from(Side),
    blocks=st.integers(1, 2**50),
    block=st.sampled_from((512, 4096)),
)
def test_an_identity_survives_the_disk(
    group: UUID, volume: int, node: int, side: Side, blocks: int, block: int
) -> None:
    identity = ImageIdentity(group, volume, node, side, blocks * block, block)
    assert ImageIdentity.unpack(identity.pack(), "here") == identity


@given(at=st.integers(0, IDENTITY_BYTES - 1), bit=st.integers(0, 7))
def test_an_identity_with_one_wrong_bit_is_refused(at: int, bit: int) -> None:
    data = bytearray(IDENTITY.pack())
    data[at] ^= 1 << bit
    with pytest.raises(DamagedError, match="there"):
        ImageIdentity.unpack(bytes(data), "there")


@given(st.binary(max_size=100))
def test_garbage_is_no_identity(data: bytes) -> None:
    with pytest.raises(DamagedError):
        ImageIdentity.unpack(data, "there")


# create and open


def test_a_new_image_is_sparse_zero_and_of_the_size_asked_for(path: Path) -> None:
    image = made(path)
    assert path.stat().st_size == IDENTITY.size_bytes
    assert path.stat().st_blocks == 0
    assert content(image) == bytes(IDENTITY.size_bytes)
    image.close()


@pytest.mark.parametrize("size_bytes", [512, 3 * 512, MIB + 512, (64 << 30) + 512])
def test_any_multiple_of_the_block_size_is_a_size(path: Path, size_bytes: int) -> None:
    image = made(path, dataclasses.replace(IDENTITY, size_bytes=size_bytes))
    image.pwrite(size_bytes - 512, b"z" * 512)
    assert content(image, size_bytes - 512) == b"z" * 512
    assert path.stat().st_size == size_bytes
    image.close()


def test_create_again_changes_nothing(path: Path) -> None:
    image = made(path)
    image.pwrite(0, b"kept")
    image.close()
    assert ImageFile.create(path, IDENTITY) is False
    assert path.read_bytes()[:4] == b"kept"


def test_create_finishes_what_a_crash_left_half_made(path: Path) -> None:
    assert ImageFile.create(path, IDENTITY) is True
    identity_path(path).unlink()
    assert ImageFile.create(path, IDENTITY) is True
    ImageFile.open(path, IDENTITY).close()


def test_a_missing_image_is_not_made_by_open(path: Path) -> None:
    with pytest.raises(MissingError, match=r"data\.img"):
        ImageFile.open(path, IDENTITY)
    assert list(path.parent.iterdir()) == []


def test_an_image_without_identity_is_missing_it(path: Path) -> None:
    ImageFile.create(path, IDENTITY)
    identity_path(path).unlink()
    with pytest.raises(MissingError, match=r"data\.img\.id"):
        ImageFile.open(path, IDENTITY)


@pytest.mark.parametrize("act", [ImageFile.create, ImageFile.open])
def test_a_disk_with_data_is_refused_because_there_is_no_initial_copy(path: Path, act: object) -> None:
    data = b"someone's data".ljust(IDENTITY.size_bytes, b"\1")
    path.write_bytes(data)
    with pytest.raises(UsageError, match="holds data already"):
        act(path, IDENTITY)  # type: ignore[operator]
    assert path.read_bytes() == data
    assert not identity_path(path).exists()


def test_an_empty_image_of_another_size_is_refused(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MIB)
    with pytest.raises(IdentityError, match=str(MIB)):
        ImageFile.create(path, IDENTITY)


def test_something_that_is_no_file_is_refused(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(UsageError, match="regular file"):
        ImageFile.create(path, IDENTITY)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"group": UUID(int=8)}, "group"),
        ({"volume_id": 9}, "volume"),
        ({"node_id": 9}, "node"),
        ({"side": Side.SECONDARY}, "side"),
        ({"size_bytes": MIB}, "size"),
        ({"block_size_bytes": 4096}, "block size"),
    ],
)
def test_the_image_of_another_is_refused(path: Path, change: dict[str, object], word: str) -> None:
    ImageFile.create(path, IDENTITY)
    other = dataclasses.replace(IDENTITY, **change)  # type: ignore[arg-type]
    for act in (ImageFile.open, ImageFile.create):
        with pytest.raises(IdentityError, match=word):
            act(path, other)


def test_an_image_that_was_cut_is_refused(path: Path) -> None:
    ImageFile.create(path, IDENTITY)
    os.truncate(path, MIB)
    with pytest.raises(IdentityError, match=str(MIB)):
        ImageFile.open(path, IDENTITY)


def test_a_second_process_is_refused(path: Path) -> None:
    image = made(path)
    script = (
        "import sys, uuid; from pathlib import Path; from blockrepl.errors import InUseError\n"
        "from blockrepl.formats.image import Side; from blockrepl.storage.image import ImageFile, ImageIdentity\n"
        f"i = ImageIdentity(uuid.UUID(int=7), 1, 2, Side.PRIMARY, {IDENTITY.size_bytes}, 512)\n"
        "try: ImageFile.open(Path(sys.argv[1]), i)\n"
        "except InUseError as error: sys.exit(error.exit_code)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == InUseError.exit_code
    image.close()
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == 0


def test_readers_share_an_image_and_keep_writers_out(path: Path) -> None:
    ImageFile.create(path, IDENTITY)
    one = ImageFile.open(path, IDENTITY, read_only=True)
    two = ImageFile.open(path, IDENTITY, read_only=True)
    with pytest.raises(InUseError):
        ImageFile.open(path, IDENTITY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        one.pwrite(0, b"x")
    one.close()
    two.close()


def test_a_missing_directory_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="directory"):
        ImageFile.create(tmp_path / "absent" / "data.img", IDENTITY)


@pytest.mark.root
def test_a_read_only_directory_is_a_clear_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="cannot be written"):
        ImageFile.create(small_disk / "data.img", IDENTITY)


@pytest.mark.root
def test_no_space_at_creation_leaves_nothing_half_made(small_disk: Path) -> None:
    for free in range(3):
        for name in range(8):
            with contextlib.suppress(OSError):
                (small_disk / str(name)).touch()
        for name in range(free):
            (small_disk / str(name)).unlink()
        before = sorted(small_disk.iterdir())
        if free < 2:
            with pytest.raises(NoSpaceError):
                ImageFile.create(small_disk / "data.img", IDENTITY)
            assert sorted(small_disk.iterdir()) == before
        else:
            ImageFile.create(small_disk / "data.img", IDENTITY)
            ImageFile.open(small_disk / "data.img", IDENTITY).close()


# write and read


@pytest.mark.root
def test_a_full_disk_fails_the_write_that_grows_and_no_other(small_disk: Path) -> None:
    image = made(small_disk / "data.img")
    half = b"a" * (MIB // 2)
    batch = batch_of(
        (Op.WRITE, 0, len(half), WriteFlag.NONE, half),
        (Op.WRITE, MIB, MIB, WriteFlag.NONE, b"b" * MIB),
        (Op.WRITE, 0, 5, WriteFlag.NONE, b"again"),
    )
    image.store(batch)
    assert batch.errors is not None
    assert [error and error.errno_code for error in batch.errors] == [None, errno.ENOSPC, None]
    assert content(image, 0, 6) == b"againa"
    image.close()


def test_a_batch_is_stored_in_its_order(path: Path) -> None:
    image = made(path)
    batch = batch_of(
        (Op.WRITE, 0, 8192, WriteFlag.NONE, b"a" * 8192),
        (Op.WRITE, 4096, 1024, WriteFlag.NONE, b"b" * 1024),
        (Op.ZERO, 1024, 512, WriteFlag.NONE, None),
        (Op.TRIM, 0, 512, WriteFlag.NONE, None),
        (Op.WRITE, 512, 512, WriteFlag.NONE, b"c" * 512),
    )
    image.store(batch)
    assert batch.errors is None
    expected = bytes(512) + b"c" * 512 + bytes(512) + b"a" * 2560 + b"b" * 1024 + b"a" * 3072
    assert content(image, 0, 8192) == expected
    image.close()


def test_metadata_lie_beside_the_image_and_are_replaced_whole(path: Path) -> None:
    image = made(path)
    assert image.metadata() == b""
    for data in (b"a" * 100, b"b"):
        batch = batch_of((Op.METADATA, 0, len(data), WriteFlag.FUA, data))
        image.store(batch)
        assert batch.errors is None
        assert image.metadata() == data
    assert content(image, 0, 100) == bytes(100)
    image.close()
    image = ImageFile.open(path, IDENTITY)
    assert image.metadata() == b"b"
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, path.name + ".id", path.name + ".meta"]
    image.close()


def test_metadata_that_cannot_be_stored_are_an_error_and_the_old_ones_stay(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = made(path)
    image.set_metadata(b"old")

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        batch = batch_of((Op.METADATA, 0, 3, WriteFlag.FUA, b"new"))
        image.store(batch)
    assert batch.errors is not None
    assert batch.errors[0] is not None
    assert image.metadata() == b"old"
    image.close()


def test_a_new_image_has_no_metadata_of_an_old_one(path: Path) -> None:
    made(path).close()
    image = ImageFile.open(path, IDENTITY)
    image.set_metadata(b"old")
    image.close()
    path.unlink()
    (path.parent / (path.name + ".id")).unlink()
    image = made(path)
    assert image.metadata() == b""
    image.close()


def test_trim_gives_space_back_and_an_allocated_zero_keeps_it(path: Path) -> None:
    image = made(path)
    image.pwrite(0, b"x" * (2 * MIB))
    image.fdatasync()
    full = path.stat().st_blocks
    image.zero(0, MIB, allocate=True)
    assert content(image, 0, MIB) == bytes(MIB)
    assert path.stat().st_blocks >= full
    image.trim(MIB, MIB)
    assert content(image, MIB, MIB) == bytes(MIB)
    assert path.stat().st_blocks * 512 <= full * 512 - MIB
    assert path.stat().st_size == IDENTITY.size_bytes
    image.close()


@pytest.mark.root
def test_where_the_file_system_cannot_zero_a_range_zeroes_are_written(small_disk: Path) -> None:
    image = made(small_disk / "data.img")  # tmpfs knows no ZERO_RANGE
    image.pwrite(0, b"x" * 70000)
    image.zero(100, 66000, allocate=True)
    assert content(image, 0, 70000) == b"x" * 100 + bytes(66000) + b"x" * 3900
    image.close()


@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "zero", "allocate", "trim"]), st.integers(0, 65535), st.integers(1, 20000)),
        max_size=12,
    )
)
def test_every_sequence_of_writes_and_zeroes_reads_back(steps: list[tuple[str, int, int]]) -> None:
    size = 1 << 16
    with tempfile.TemporaryDirectory() as directory:
        image = made(Path(directory) / "data.img", dataclasses.replace(IDENTITY, size_bytes=size))
        model = bytearray(size)
        for number, (verb, offset, length) in enumerate(steps, 1):
            length = min(length, size - offset)
            data = bytes([number]) * length
            if verb == "write":
                image.pwrite(offset, data)
            else:
                data = bytes(length)
                if verb == "trim":
                    image.trim(offset, length)
                else:
                    image.zero(offset, length, allocate=verb == "allocate")
            model[offset : offset + length] = data
        assert content(image) == model
        assert all(not any(model[at : at + size]) for at, size, data in image.allocation(0, size) if not data)
        image.close()


def test_reads_of_what_was_just_written_come_from_the_cache(path: Path) -> None:
    image = made(path)
    image.pwrite(4096, b"cached".ljust(4096))
    view = memoryview(bytearray(4096))
    assert image.read_cached(4096, view)
    assert bytes(view[:6]) == b"cached"
    image.close()


def test_a_read_of_what_is_not_cached_does_not_wait(path: Path) -> None:
    image = made(path)
    image.pwrite(0, b"cold" * 1024)
    image.fdatasync()
    os.posix_fadvise(image.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    view = memoryview(bytearray(4096))
    if image.read_cached(0, view):
        pytest.skip("this file system keeps its pages")
    image.read(0, view)
    assert bytes(view) == b"cold" * 1024
    image.close()


def test_allocation_covers_the_range_and_tells_holes_from_data(path: Path) -> None:
    image = made(path)
    image.pwrite(MIB, b"x" * 65536)
    extents = image.allocation(4096, 3 * MIB)
    assert extents == [
        (4096, MIB - 4096, False),
        (MIB, 65536, True),
        (MIB + 65536, 2 * MIB + 4096 - 65536, False),
    ]
    image.close()


def test_allocation_beyond_its_limit_is_called_data(path: Path) -> None:
    image = made(path)
    for at in range(0, MIB, 128 * 1024):
        image.pwrite(at + 65536, b"x" * 65536)
    extents = image.allocation(0, MIB, limit=4)
    assert extents == [(0, 65536, False), (65536, 65536, True), (131072, MIB - 131072, True)]
    image.close()


def test_an_image_grows_and_what_is_new_reads_as_zeroes(path: Path) -> None:
    image = made(path)
    image.pwrite(IDENTITY.size_bytes - 512, memoryview(b"x" * 512))
    for _ in range(2):
        image.grow(8 * MIB)
        assert image.size_bytes == IDENTITY.size_bytes, "hosts see it when it is in effect"
    image.close()
    image = ImageFile.open(path, dataclasses.replace(IDENTITY, size_bytes=8 * MIB))
    assert content(image) == bytes(IDENTITY.size_bytes - 512) + b"x" * 512 + bytes(4 * MIB)
    image.close()


@pytest.mark.parametrize("file_bytes", [4 * MIB, 8 * MIB])
def test_a_growth_that_a_crash_cut_short_is_finished_at_the_start(path: Path, file_bytes: int) -> None:
    made(path).close()
    os.truncate(path, file_bytes)  # the identity still says the old size
    larger = dataclasses.replace(IDENTITY, size_bytes=8 * MIB)
    for _ in range(2):
        ImageFile.enlarge(path, larger)
        ImageFile.open(path, larger).close()
    ImageFile.enlarge(path, IDENTITY)  # never smaller
    ImageFile.open(path, larger).close()


def test_the_image_of_another_volume_is_not_grown(path: Path) -> None:
    made(path).close()
    ImageFile.enlarge(path, dataclasses.replace(IDENTITY, volume_id=9, size_bytes=8 * MIB))
    assert path.stat().st_size == IDENTITY.size_bytes
