"""The torture's judge: it must find what is lost, torn or out of order, and nothing else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.torturelib.history import History, Write
from scripts.torturelib.stamps import BLOCK_BYTES, FOREIGN, ZEROES, read_stamp, stamp

Image = dict[int, list[tuple[int, int]]]


def image(*stamps: int, volumes: int = 2) -> Image:
    """Block 0 of volume 0, block 0 of volume 1, block 1 of volume 0, …"""
    found: Image = {volume: [] for volume in range(volumes)}
    for place, each in enumerate(stamps):
        found[place % volumes].append((place // volumes, each))
    return found


def acknowledged(history: History, volume: int, first: int, count: int = 1, *, zero: bool = False) -> Write:
    write = history.submit(volume, first, count, zero=zero)
    history.acknowledge(write)
    return write


def test_a_stamp_is_read_back_only_whole_and_in_its_place() -> None:
    block = stamp(1, 7, 42)
    assert len(block) == BLOCK_BYTES
    assert read_stamp(1, 7, block) == 42
    assert read_stamp(1, 8, block) == read_stamp(0, 7, block) == FOREIGN
    assert read_stamp(1, 7, ZEROES) == 0
    older = stamp(1, 7, 41)
    assert read_stamp(1, 7, block[:512] + older[512:]) == FOREIGN
    assert read_stamp(1, 7, block[:-512] + bytes(512)) == FOREIGN


def test_a_prefix_is_well_and_what_it_lacks_is_lost() -> None:
    history = History()
    for volume in (0, 1, 0, 1):
        acknowledged(history, volume, 0)
    verdict = history.judge(image(3, 2))
    assert (verdict.problems, [write.number for write in verdict.lost]) == ([], [4])
    assert (verdict.writes, verdict.acknowledged, verdict.stamped_blocks) == (4, 4, 2)


@pytest.mark.parametrize(("on_a", "on_b"), [(1, 4), (0, 2), (0, 4)])
def test_a_later_write_without_the_earlier_one_on_the_other_volume_is_a_violation(on_a: int, on_b: int) -> None:
    history = History()
    for volume in (0, 1, 0, 1):
        acknowledged(history, volume, 0)
    assert "order" in history.judge(image(on_a, on_b)).problems[0]


def test_writes_in_flight_together_may_be_there_in_any_combination() -> None:
    for on_a, on_b in itertools.product((0, 1), (0, 2)):
        history = History()
        for write in [history.submit(volume, 0, 1, zero=False) for volume in (0, 1)]:
            history.acknowledge(write)
        assert history.judge(image(on_a, on_b)).problems == []


def test_a_write_whose_fate_is_unknown_may_be_there_or_not_and_is_never_lost() -> None:
    for found in (0, 1):
        history = History()
        history.submit(0, 0, 1, zero=False)
        assert history.unsure() == {(0, 0)}
        verdict = history.judge(image(found, 0))
        assert (verdict.problems, verdict.lost) == ([], [])


def test_a_write_of_several_blocks_is_there_whole_or_not_at_all() -> None:
    history = History()
    acknowledged(history, 0, 0, 2)
    assert history.judge(image(1, 1, volumes=1)).problems == []
    verdict = history.judge(image(1, 0, volumes=1))
    assert "torn" in "".join(verdict.problems) or "order" in "".join(verdict.problems)
    unknown = History()
    unknown.submit(0, 0, 2, zero=False)
    assert "torn" in unknown.judge(image(0, 1, volumes=1)).problems[0]


def test_a_torn_block_and_data_from_before_the_last_known_state_are_named() -> None:
    history = History()
    acknowledged(history, 0, 0)
    assert "no whole block" in history.judge(image(FOREIGN, volumes=1)).problems[0]
    acknowledged(history, 0, 0)
    history.rebase(image(2, volumes=1))
    assert history.judge(image(2, volumes=1)).problems == []
    assert "holds write 1" in history.judge(image(1, volumes=1)).problems[0]


def test_zeroes_are_taken_for_whichever_version_makes_sense() -> None:
    history = History()
    acknowledged(history, 0, 0)
    acknowledged(history, 0, 0, zero=True)
    acknowledged(history, 1, 0)
    assert history.judge(image(0, 3)).problems == []  # zeroed
    assert history.judge(image(0, 3)).lost == []
    assert "order" in history.judge(image(1, 3)).problems[0]
    history = History()
    acknowledged(history, 0, 0, zero=True)  # on a block that was zero before: both versions look alike
    acknowledged(history, 1, 0)
    acknowledged(history, 0, 1)
    assert history.judge({0: [(0, 0), (1, 3)], 1: [(0, 2)]}).problems == []
    assert "order" in history.judge({0: [(0, 0), (1, 3)], 1: [(0, 0)]}).problems[0]


@given(st.data())
def test_the_verdict_equals_a_search_over_all_sets_of_writes(data: st.DataObject) -> None:
    """Against a check by definition: is there a downward closed set of writes that gives this image?"""
    history = History()
    open_writes: dict[tuple[int, int], Write] = {}
    writes: list[Write] = []
    for _ in range(data.draw(st.integers(1, 6))):
        answered: bool = data.draw(st.booleans())
        if open_writes and answered:
            place: tuple[int, int] = data.draw(st.sampled_from(sorted(open_writes)))
            history.acknowledge(open_writes.pop(place))
            continue
        place = data.draw(st.sampled_from([(0, 0), (1, 0)]))
        if place not in open_writes:
            open_writes[place] = history.submit(*place, 1, zero=data.draw(st.booleans()))
            writes.append(open_writes[place])
    stamps = [data.draw(st.sampled_from([0, *(write.number for write in writes)])) for _ in range(2)]
    assert (history.judge(image(*stamps)).problems == []) == possible(writes, stamps)


def possible(writes: list[Write], stamps: list[int]) -> bool:
    for size in range(len(writes) + 1):
        for there in itertools.combinations(writes, size):
            missing = [write for write in writes if write not in there]
            if any(lost.acknowledged < each.submitted for lost in missing for each in there):
                continue
            left = [0, 0]
            for write in there:
                left[write.volume] = 0 if write.zero else write.number
            # A missing write to a block must not come before one that is there.
            order = all(
                not (lost.volume == each.volume and lost.submitted < each.submitted)
                for lost in missing for each in there
            )  # fmt: skip
            if order and left == stamps:
                return True
    return False
