"""Dirty bitmaps against a set of block numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.bitmap import PAGE_BYTES, Bitmap

BLOCK = 4096
SIZES = st.integers(1, 40 * BLOCK)
RANGES = st.lists(st.tuples(st.integers(0, 40 * BLOCK), st.integers(0, 9 * BLOCK)), max_size=8)


def blocks_of(offset: int, length: int) -> set[int]:
    return set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)) if length else set()


def found(bitmap: Bitmap) -> set[int]:
    return {block for first, count in bitmap.runs() for block in range(first, first + count)}


@given(SIZES, RANGES)
def test_it_is_the_set_of_the_blocks_marked(size: int, ranges: list[tuple[int, int]]) -> None:
    bitmap, model = Bitmap(size, BLOCK), set[int]()
    for offset, length in ranges:
        offset, length = min(offset, size), min(length, size - min(offset, size))
        new = not blocks_of(offset, length) <= model
        assert bitmap.covers(offset, length) is not new
        assert bitmap.mark(offset, length) is new
        model |= blocks_of(offset, length)
        assert bitmap.covers(offset, length)
    assert found(bitmap) == model
    assert bitmap.count == len(model)
    assert bitmap.dirty_bytes == sum(min(BLOCK, size - block * BLOCK) for block in model)
    copy = Bitmap(size, BLOCK)
    for first, bits in bitmap.pieces():
        assert copy.merge(first, bits)
        assert not copy.merge(first, bits)
    assert (copy.bits, copy.count) == (bitmap.bits, bitmap.count)
    assert Bitmap(size, BLOCK, bitmap.bits).count == bitmap.count
    bitmap.clear()
    assert (found(bitmap), bitmap.count) == (set(), 0)
    bitmap.fill()
    assert (bitmap.count, bitmap.dirty_bytes) == (-(-size // BLOCK), size)


def test_runs_are_cut_and_begin_where_asked() -> None:
    bitmap = Bitmap(40 * BLOCK, BLOCK)
    bitmap.mark(3 * BLOCK, 10 * BLOCK)
    assert list(bitmap.runs(5, most=4)) == [(5, 4), (9, 4)]


def test_changed_pages_are_named() -> None:
    bitmap = Bitmap(3 * 8 * PAGE_BYTES * BLOCK, BLOCK)
    bitmap.mark(8 * PAGE_BYTES * BLOCK - 1, 2)
    assert bitmap.changed == {0, 1}
    bitmap.changed.clear()
    assert not bitmap.mark(8 * PAGE_BYTES * BLOCK - 1, 2)
    assert not bitmap.changed
    bitmap.clear()
    assert bitmap.changed == {0, 1, 2}


def test_bits_that_do_not_fit_are_refused() -> None:
    bitmap = Bitmap(16 * BLOCK, BLOCK)
    for first, bits in ((4, b"\x01"), (8, b"\x01\x01"), (16, b"\x01")):
        with pytest.raises(ValueError, match="bits of blocks"):
            bitmap.merge(first, bits)
