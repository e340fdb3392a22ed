"""What roles keep durably comes back as it was, and anything else is called damaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import DamagedError
from blockrepl.formats.journal import STATE_BYTES
from blockrepl.formats.link import Epoch
from blockrepl.formats.state import (
    IntermediateState,
    PrimaryRow,
    PrimaryState,
    SecondaryState,
    decode_intermediate,
    decode_primary,
    decode_secondary,
    encode_intermediate,
    encode_primary,
    encode_secondary,
)

number = st.integers(0, (1 << 64) - 1)
short = st.integers(0, 65535)
epochs = st.builds(Epoch, number, st.binary(min_size=16, max_size=16))
history = st.lists(st.tuples(epochs, number), max_size=5)
incarnation = st.integers(0, (1 << 32) - 1)
rows = st.lists(st.builds(PrimaryRow, short, incarnation, number, number, number), max_size=4)


byte, flag = st.integers(0, 255), st.booleans()


@given(
    st.builds(
        PrimaryState, epochs, epochs, incarnation, number, byte, byte, flag, flag, flag, flag, number, short, number
    )
)
def test_a_primarys_state_comes_back(state: PrimaryState) -> None:
    assert decode_primary(encode_primary(state)) == state


@given(
    st.builds(
        IntermediateState, epochs, epochs, history, incarnation, number, number, rows,
        st.lists(st.tuples(short, number), max_size=4), byte, byte, flag, flag, flag, number, number,
        st.lists(st.tuples(short, number), max_size=4), number, number, flag, flag, st.lists(short, max_size=4),
        st.lists(st.tuples(short, number), max_size=4), flag, flag, flag, st.lists(epochs, max_size=4),
    )
)  # fmt: skip
def test_an_intermediates_state_comes_back(state: IntermediateState) -> None:
    assert decode_intermediate(encode_intermediate(state)) == state


@given(
    st.builds(
        SecondaryState, epochs, epochs, history, number, st.lists(short, max_size=5), st.booleans(), st.booleans(),
        st.booleans(), number, number, number, number, byte, flag, number, flag, number, number, flag, flag, byte,
    )
)  # fmt: skip
def test_a_secondarys_state_comes_back(state: SecondaryState) -> None:
    assert decode_secondary(encode_secondary(state)) == state


@pytest.mark.parametrize("decode", [decode_primary, decode_intermediate, decode_secondary])
@pytest.mark.parametrize("blob", [b"", b"\x09" + bytes(500), b"\x01" + bytes(20)])
def test_anything_else_is_damage(decode: Callable[[bytes], Any], blob: bytes) -> None:
    with pytest.raises(DamagedError, match="not a state"):
        decode(blob)


def test_the_largest_group_and_a_long_history_fit_a_superblock() -> None:
    epoch = Epoch(1 << 60, bytes(16))
    state = IntermediateState(
        epoch,
        epoch,
        [(epoch, 1 << 60)] * 1000,
        1,
        1,
        1,
        [PrimaryRow(n) for n in range(128)],
        [(n, 1) for n in range(128)],
    )
    assert len(encode_intermediate(state)) <= STATE_BYTES
