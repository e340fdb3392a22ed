"""The torture's database: recovery must notice every break of the order across its two volumes."""

from __future__ import annotations

import random

import pytest

from scripts.torturelib.database import BLOCK_BYTES, PLACE_BYTES, CorruptError, Database, State, recover


class FakeVolume:
    """Remembers every write, in one order over both volumes."""

    journal: list[tuple[str, int, bytes]]

    def __init__(self, name: str, journal: list[tuple[str, int, bytes]], limit: int) -> None:
        self.name, self.journal, self.limit = name, journal, limit

    def write(self, offset_bytes: int, payload: bytes, *, durable: bool = False) -> None:
        if len(self.journal) >= self.limit:
            raise OSError("enough")
        self.journal.append((self.name, (offset_bytes - PLACE_BYTES) // BLOCK_BYTES, payload))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def writes_of_a_run(limit: int) -> list[tuple[str, int, bytes]]:
    database = Database(lambda name: name, "seed", fresh=True)
    journal: list[tuple[str, int, bytes]] = []
    volumes = {name: FakeVolume(name, journal, limit) for name in ("data", "log")}
    database._volumes.update(volumes)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="enough"):
        database._work(database._begin())
    return journal


def recovered(writes: list[tuple[str, int, bytes]]) -> State:
    blocks = {(where, block): raw for where, block, raw in writes}
    return recover(lambda where, block: blocks.get((where, block), bytes(BLOCK_BYTES)))


def test_every_prefix_of_its_writes_can_be_recovered_and_only_grows() -> None:
    writes = writes_of_a_run(1200)
    last = 0
    for length in range(60, len(writes)):
        state = recovered(writes[:length])
        assert state.last >= last
        last = state.last
    assert last > 500


def test_a_later_write_without_an_earlier_one_is_noticed_unless_it_changes_nothing() -> None:
    writes = writes_of_a_run(1200)
    chance = random.Random(7)
    noticed = 0
    for _ in range(300):
        length = chance.randrange(400, len(writes))
        missing = chance.randrange(length - 40, length - 1)
        with_hole = writes[:missing] + writes[missing + 1 : length]
        try:
            state = recovered(with_hole)
        except CorruptError:
            noticed += 1
            continue
        whole = recovered(writes[:length])
        # What went unnoticed was not needed: a page that the log gives back, or the last block of the log.
        assert state.pages == whole.pages or state.last < whole.last
    assert noticed > 100
