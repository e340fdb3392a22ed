"""What a resync copies at one primary, and what it compares first."""

from __future__ import annotations

from blockrepl.bitmap import Bitmap
from blockrepl.replication.copier import ANSWER_S, Copier

BLOCK = 64 << 10


def copier(*, verify: bool = False, compare: bool = False) -> Copier:
    bitmap = Bitmap(1 << 20, BLOCK)
    bitmap.mark(2 * BLOCK, 2 * BLOCK)
    bitmap.mark(9 * BLOCK, 1)
    return Copier(7, {1: bitmap}, verify=verify, rate_bytes=0, cursor=(0, 0), now_s=0.0, compare=compare)


def test_bits_alone_are_copied_as_they_are() -> None:
    plain = copier()
    assert plain.next_digest(0.0) is None
    assert [plain.next_copy(0.0) for _ in range(3)] == [(1, 2 * BLOCK, 4 * BLOCK), (1, 9 * BLOCK, 10 * BLOCK), None]


def test_what_bits_say_is_compared_first_and_only_what_differs_is_copied() -> None:
    both = copier(compare=True)
    assert both.total_bytes == 3 * BLOCK
    assert both.next_copy(0.0) is None
    assert both.next_digest(0.0) == (1, 2 * BLOCK, 4 * BLOCK)
    assert both.next_digest(0.0) == (1, 9 * BLOCK, 10 * BLOCK)
    assert both.next_digest(0.0) is None
    assert both.compared(1, 2 * BLOCK, [3 * BLOCK], BLOCK)
    assert both.compared(1, 9 * BLOCK, [], BLOCK)
    assert not both.done
    assert both.next_copy(0.0) == (1, 3 * BLOCK, 4 * BLOCK)
    both.acknowledged(1, 3 * BLOCK)
    assert both.next_metadata() == 1
    assert not both.done
    both.metadata_done(1)
    assert (both.done, both.copied_bytes, both.compared_bytes) == (True, BLOCK, 3 * BLOCK)


def test_a_comparison_that_nobody_answers_is_asked_again() -> None:
    both = copier(compare=True)
    first = both.next_digest(0.0)
    assert first is not None
    both.next_digest(0.0)
    both.ask_again(1000.0)
    assert both.next_digest(1000.0) is None, "it is not even in the journal"
    both.asked(1, first[1], 1000.0)
    both.ask_again(1000.0 + ANSWER_S)
    assert both.next_digest(1000.0 + ANSWER_S) is None
    both.ask_again(1000.1 + ANSWER_S)
    assert both.next_digest(1000.1 + ANSWER_S) == first
    assert both.compared(1, first[1], [], BLOCK)
    assert not both.compared(1, first[1], [first[1]], BLOCK)  # the first answer came late
    assert both.next_copy(2000.0) is None
