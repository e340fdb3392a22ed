"""The receive buffers and their counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockrepl.chunks import ROOM_BYTES, ChunkPool


def test_the_last_release_gives_a_chunk_back_for_the_next_taker() -> None:
    pool = ChunkPool()
    chunk = pool.take()
    chunk.hold(2)
    chunk.release()
    chunk.release()
    assert pool.take() is not chunk
    chunk.release()
    assert pool.take() is chunk
    assert chunk.users == 1


def test_releasing_twice_is_our_mistake() -> None:
    chunk = ChunkPool().take()
    chunk.release()
    with pytest.raises(AssertionError, match="twice"):
        chunk.release()


def test_a_large_chunk_is_reused_for_what_fits_into_it() -> None:
    pool = ChunkPool(chunk_bytes=1024)
    large = pool.take(5000)
    large.release()
    assert pool.take(6000) is not large
    assert pool.take(4000) is large
    assert len(pool.take(1000).buffer) == 1024


def test_what_exceeds_the_budget_is_not_kept() -> None:
    pool = ChunkPool(chunk_bytes=1024, keep_bytes=4096)
    chunks = [pool.take() for _ in range(6)]
    for chunk in chunks:
        chunk.release()
    again = [pool.take() for _ in range(6)]
    assert sum(chunk in chunks for chunk in again) == 4


def test_taking_from_the_pool_makes_room_in_its_budget() -> None:
    pool = ChunkPool(chunk_bytes=1024, keep_bytes=2048)
    for _ in range(10):
        one, two, large = pool.take(), pool.take(), pool.take(1500)
        one.release()
        two.release()
        large.release()
    assert pool.take() in (one, two)


def test_the_current_chunk_starts_anew_when_nobody_looks_into_it() -> None:
    pool = ChunkPool()
    chunk, filled = pool.borrow()
    assert filled == 0
    pool.put(chunk, 1000)
    assert pool.borrow() == (chunk, 0)


def test_what_is_still_in_use_is_not_overwritten() -> None:
    pool = ChunkPool()
    chunk, _ = pool.borrow()
    chunk.hold()
    pool.put(chunk, 1000)
    assert pool.borrow() == (chunk, 1000)
    pool.put(chunk, 2000)
    chunk.release()
    assert pool.borrow() == (chunk, 0)


def test_a_current_chunk_in_use_without_room_is_replaced() -> None:
    pool = ChunkPool()
    chunk, _ = pool.borrow()
    chunk.hold()
    pool.put(chunk, pool.chunk_bytes - ROOM_BYTES + 1)
    other, filled = pool.borrow()
    assert other is not chunk
    assert filled == 0
    assert chunk.users == 1


def test_a_borrower_may_keep_the_chunk_and_bring_it_back() -> None:
    pool = ChunkPool()
    chunk, _ = pool.borrow()
    pool.part_with(chunk)
    other, _ = pool.borrow()
    assert other is not chunk
    pool.part_with(other)
    chunk.hold()  # a batch still looks into it
    pool.adopt(chunk, 500)
    assert pool.borrow() == (chunk, 500)
    pool.adopt(other, 0)  # there is a current one: this one goes back to the pool
    assert pool.take() is other


def test_a_large_chunk_never_becomes_the_current_one() -> None:
    pool = ChunkPool()
    large = pool.take(1 << 20)
    pool.adopt(large, 100)
    chunk, filled = pool.borrow()
    assert len(chunk.buffer) == pool.chunk_bytes
    assert filled == 0


def test_large_chunks_take_memory_when_bytes_come() -> None:
    before = resident_bytes()
    chunks = [ChunkPool().take(32 << 20) for _ in range(16)]
    assert resident_bytes() - before < 32 << 20
    chunks[0].view[:4] = b"used"
    assert bytes(chunks[0].buffer[:4]) == b"used"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
