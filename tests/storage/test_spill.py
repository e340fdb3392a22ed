"""Records kept beside the ring for a primary that is away: all that was called durable is there, or it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import DamagedError
from blockrepl.storage.spill import SpillDirectory
from tests.replication.roles import numbered


def records(*numbers: int) -> list[tuple[int, bytes]]:
    return [(number, bytes(numbered(number, number - 1)[1])) for number in numbers]


def test_what_was_appended_is_read_again_in_order_by_a_later_process(tmp_path: Path) -> None:
    first = SpillDirectory(tmp_path)
    first.append(1, records(3, 7))
    first.append(1, records(9))
    again = SpillDirectory(tmp_path)
    again.load(1, 9)
    for spills in (first, again):
        wanted = spills.after(1, 3, 1 << 30)
        assert [each.last for each in wanted] == [7, 9]
        assert spills.read(1, wanted) == [record for _, record in records(7, 9)]
        assert [each.last for each in spills.after(1, 0, 1)] == [3]
        assert not spills.after(2, 0, 1)


@given(cut=st.integers(1, 600))
def test_a_torn_end_is_cut_and_written_over(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("spill")
    first = SpillDirectory(directory)
    first.append(1, records(3))
    whole = len((directory / "spill-1").read_bytes())
    first.append(1, records(7))
    path = directory / "spill-1"
    path.write_bytes(path.read_bytes()[: whole + cut])
    again = SpillDirectory(directory)
    again.load(1, 3)
    assert [each.last for each in again.after(1, 0, 1 << 30)] == [3]
    again.append(1, records(8))
    last = SpillDirectory(directory)
    last.load(1, 8)
    assert [each.last for each in last.after(1, 0, 1 << 30)] == [3, 8]


def test_less_than_was_durable_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="ends at number 0"):
        SpillDirectory(tmp_path).load(1, 5)
    SpillDirectory(tmp_path).append(1, records(3, 7))
    path = tmp_path / "spill-1"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="ends at number 3"):
        SpillDirectory(tmp_path).load(1, 7)


def test_what_is_dropped_is_gone(tmp_path: Path) -> None:
    spills = SpillDirectory(tmp_path)
    spills.append(1, records(3))
    spills.drop(1)
    spills.drop(1)
    assert not spills.after(1, 0, 1 << 30)
    assert not list(tmp_path.iterdir())
