"""The fuzzer without sockets. `scripts/fuzz` has more cases."""

from __future__ import annotations

import resource
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.iscsi.fuzz import Fuzzer, campaign
from tests.iscsi.pdu import Op

CASES = 3000
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_conversation_harms_the_target_or_an_honest_initiator() -> None:
    campaign(0, CASES // 3)  # memory grows at first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzzer = campaign(CASES // 3, CASES - CASES // 3)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 64 * MIB
    # It got beyond the door: every kind of PDU that a target sends was seen.
    assert set(fuzzer.answers) == {op for op in Op if op >= Op.NOP_IN}
    assert fuzzer.answers[Op.DATA_IN] > CASES / 50


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False), seed=st.integers(0, 3))
def test_no_conversation_of_hypothesis_does_either(random: Random, seed: int) -> None:
    fuzzer = Fuzzer(seed)
    try:
        fuzzer.case(random)
    finally:
        fuzzer.close()
