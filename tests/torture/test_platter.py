"""The disk that loses power: what was flushed stays, of the rest anything may, and nothing is answered in between."""

from __future__ import annotations

import asyncio
from pathlib import Path

from blockrepl.block import Op, WriteBatch
from scripts.torturelib.platter import PAGE_BYTES, SECTOR_BYTES, Platter

PAGES = 64


def write(platter: Platter, page: int, content: bytes, answers: list[int] | None = None) -> None:
    batch = WriteBatch(lambda batch: answers.append(page) if answers is not None else None)
    batch.ops.append(Op.WRITE)
    batch.offsets.append(page * PAGE_BYTES)
    batch.lengths.append(len(content))
    batch.flags.append(0)
    batch.payloads.append(memoryview(content))
    if platter.submit(batch) and answers is not None:
        answers.append(page)


async def flush(platter: Platter) -> None:
    done = asyncio.get_running_loop().create_future()
    platter.flush(lambda _error: done.set_result(None))
    await done


def pages(platter: Platter) -> list[bytes]:
    content = platter.platter_path.read_bytes()
    return [content[at : at + PAGE_BYTES] for at in range(0, len(content), PAGE_BYTES)]


def filled(number: int) -> bytes:
    return bytes([number]) * PAGE_BYTES


async def test_what_was_flushed_stays_and_of_the_rest_any_page_may_be_kept_dropped_or_torn(tmp_path: Path) -> None:
    kept = dropped = torn = 0
    for seed in range(12):
        folder = tmp_path / str(seed)
        folder.mkdir()
        platter = Platter("disk", folder, PAGES * PAGE_BYTES)
        for page in range(PAGES // 2):
            write(platter, page, filled(1))
        await flush(platter)
        for page in range(PAGES):
            write(platter, page, filled(2))
        assert pages(platter)[0] == filled(1)
        platter.freeze()
        loss = platter.lose(str(seed))
        assert loss.kept + loss.dropped + loss.torn == PAGES
        kept, dropped, torn = kept + loss.kept, dropped + loss.dropped, torn + loss.torn
        for number, content in enumerate(pages(platter)):
            before = 1 if number < PAGES // 2 else 0
            sectors = {content[at : at + SECTOR_BYTES] for at in range(0, PAGE_BYTES, SECTOR_BYTES)}
            assert sectors <= {bytes([before]) * SECTOR_BYTES, bytes([2]) * SECTOR_BYTES}
        platter.close()
    assert min(kept, dropped, torn) > 0


async def test_a_flush_covers_what_came_before_it_and_no_more(tmp_path: Path) -> None:
    platter = Platter("disk", tmp_path, PAGES * PAGE_BYTES)
    write(platter, 0, filled(1))
    done = asyncio.get_running_loop().create_future()
    platter.flush(lambda _error: done.set_result(None))
    write(platter, 1, filled(2))
    assert pages(platter)[0] == bytes(PAGE_BYTES)
    await done
    assert pages(platter)[:2] == [filled(1), bytes(PAGE_BYTES)]
    platter.close()


async def test_between_freezing_and_losing_nothing_is_answered_and_afterwards_nothing_arrives(tmp_path: Path) -> None:
    platter = Platter("disk", tmp_path, PAGES * PAGE_BYTES)
    answers: list[int] = []
    platter.freeze()
    write(platter, 5, filled(5), answers)
    flushed = asyncio.ensure_future(flush(platter))
    await asyncio.sleep(0.01)
    assert answers == []
    assert not flushed.done()
    platter.lose("seed")
    await flushed
    assert answers == [5]
    before = pages(platter)
    write(platter, 6, filled(6), answers)
    await flush(platter)
    assert answers == [5, 6]
    assert pages(platter) == before
    platter.close()
