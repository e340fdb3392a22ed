"""Bitmaps on disk: what was saved is there, torn and damaged pages count as all ones, others' files are refused."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.bitmap import Bitmap
from blockrepl.errors import DamagedError, IdentityError, InUseError, MissingError, StorageError, UsageError
from blockrepl.formats.bitmap import HEADER_BYTES, PAGE_BITS_BYTES, PAGE_BYTES, bitmap_header, decode_page, encode_page
from blockrepl.storage.bitmap_file import BitmapFile, BitmapIdentity
from blockrepl.storage.executor import DiskThread

BLOCK = 65536
WHO = BitmapIdentity(bytes(16), 1, 2, 3 * PAGE_BITS_BYTES * 8 * BLOCK - 5, BLOCK)


def reopened(path: Path, identity: BitmapIdentity = WHO) -> Bitmap:
    file = BitmapFile.open(path, identity)
    file.close()
    return file.bitmap


async def save(file: BitmapFile, *ranges: tuple[int, int]) -> None:
    loop = asyncio.get_running_loop()
    disk = DiskThread(loop, "bits")
    saved = asyncio.Event()
    for offset, length in ranges:
        file.bitmap.mark(offset, length)
    file.save(disk, saved.set)
    await asyncio.wait_for(saved.wait(), 10)
    disk.close()


async def test_what_was_saved_is_there(tmp_path: Path) -> None:
    path = tmp_path / "bits"
    BitmapFile.create(path, WHO)
    file = BitmapFile.open(path, WHO)
    await save(file, (0, 1), (PAGE_BITS_BYTES * 8 * BLOCK, 3 * BLOCK), (WHO.size_bytes - 1, 1))
    file.close()
    assert reopened(path).bits == file.bitmap.bits
    assert reopened(path).count == 5


async def test_saves_that_wait_become_one_and_are_all_told(tmp_path: Path) -> None:
    path = tmp_path / "bits"
    BitmapFile.create(path, WHO)
    file = BitmapFile.open(path, WHO)
    disk = DiskThread(asyncio.get_running_loop(), "bits")
    told: list[int] = []
    last = asyncio.Event()
    for number in range(5):
        file.bitmap.mark(number * BLOCK, 1)
        file.save(disk, lambda number=number: told.append(number))  # type: ignore[misc]
    file.save(disk, last.set)
    await asyncio.wait_for(last.wait(), 10)
    disk.close()
    file.close()
    assert told == [0, 1, 2, 3, 4]
    assert reopened(path).count == 5


@pytest.mark.parametrize("page", [0, 1, 2])
async def test_a_page_with_a_wrong_checksum_counts_as_all_ones(tmp_path: Path, page: int) -> None:
    path = tmp_path / "bits"
    BitmapFile.create(path, WHO)
    with path.open("r+b") as raw:
        raw.seek(PAGE_BYTES * (1 + page) + 77)
        raw.write(b"\x10")
    bitmap = reopened(path)
    blocks = min(bitmap.blocks, (page + 1) * PAGE_BITS_BYTES * 8) - page * PAGE_BITS_BYTES * 8
    assert list(bitmap.runs()) == [(page * PAGE_BITS_BYTES * 8, blocks)]
    assert reopened(path).bits == bitmap.bits, "and stays so"


@given(st.integers(0, 1 << 32), st.integers(0, PAGE_BYTES // 512 - 1))
def test_any_torn_page_is_noticed_or_is_one_of_the_two(seed: int, keep: int) -> None:
    bits = Random(seed).randbytes(PAGE_BITS_BYTES)
    old, new = encode_page(3, bytes(PAGE_BITS_BYTES)), encode_page(3, bits)
    torn = new[: keep * 512] + old[keep * 512 :]
    assert decode_page(3, torn) in (None, bits, bytes(PAGE_BITS_BYTES))
    assert decode_page(4, new) is None, "a page at another's place"


def test_the_header_is_the_declared_one_and_anything_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bits"
    BitmapFile.create(path, WHO)
    assert bitmap_header.parse(path.read_bytes()).block_bytes == BLOCK
    assert HEADER_BYTES == 44
    with pytest.raises(IdentityError, match="volume 1"):
        BitmapFile.open(path, dataclasses.replace(WHO, volume=9))
    with pytest.raises(MissingError):
        BitmapFile.open(tmp_path / "none", WHO)
    with pytest.raises(UsageError, match="exists"):
        BitmapFile.create(path, WHO)
    held = BitmapFile.open(path, WHO)
    with pytest.raises(InUseError):
        BitmapFile.open(path, WHO)
    held.close()
    with path.open("r+b") as raw:
        raw.seek(30)
        raw.write(b"\xff")
    with pytest.raises(DamagedError):
        BitmapFile.open(path, WHO)


async def test_after_an_error_nothing_is_saved_any_more(tmp_path: Path) -> None:
    path = tmp_path / "bits"
    BitmapFile.create(path, WHO)
    file = BitmapFile.open(path, WHO)
    disk = DiskThread(asyncio.get_running_loop(), "bits")
    failed: list[StorageError] = []
    file.on_failed = failed.append
    told: list[str] = []
    os.close(file._fd)
    file.bitmap.mark(0, 1)
    file.save(disk, lambda: told.append("saved"))
    for _ in range(200):
        if failed:
            break
        await asyncio.sleep(0.01)
    disk.close()
    assert len(failed) == 1
    assert not told
    with pytest.raises(StorageError):
        file.save(disk, lambda: None)


async def test_a_bitmap_grows_in_place_while_a_save_is_under_way_and_keeps_every_bit(tmp_path: Path) -> None:
    path, disk = tmp_path / "bits", DiskThread(asyncio.get_running_loop(), "test")
    BitmapFile.create(path, WHO)
    file, saved = BitmapFile.open(path, WHO), asyncio.Event()
    held = file.bitmap
    held.mark(0, 1)
    file.save(disk, saved.set)
    held.mark(3 * BLOCK, 1)  # not asked to be saved yet
    larger = dataclasses.replace(WHO, size_bytes=2 * WHO.size_bytes)
    file.grow(larger)
    assert file.bitmap is held
    held.mark(larger.size_bytes - 1, 1)
    again = asyncio.Event()
    file.save(disk, again.set)
    await asyncio.wait_for(asyncio.gather(saved.wait(), again.wait()), 10)
    disk.close()
    file.close()
    found = BitmapFile.read(path, larger)
    assert list(found.runs()) == [(0, 1), (3, 1), (found.blocks - 1, 1)]
    with pytest.raises(IdentityError):
        BitmapFile.read(path, WHO)


def test_a_growth_that_a_crash_kept_from_beginning_is_finished_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "bits"
    BitmapFile.create(path, WHO)
    larger = dataclasses.replace(WHO, size_bytes=WHO.size_bytes + BLOCK)
    (tmp_path / ".bits.new").write_bytes(b"half a file that a crash left")
    for _ in range(2):
        BitmapFile.enlarge(path, larger)
        assert BitmapFile.read(path, larger).count == 0
