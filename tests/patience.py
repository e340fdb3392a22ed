"""How long tests wait: one factor for a machine that is slower than most, BLOCKREPL_TEST_PATIENCE.

Every wait is for a state, and its limit is there only so that a state that never comes is told as that: about ten
times what a quiet machine with two cores needs. No test asserts how long something took.
"""

from __future__ import annotations

import os

import pytest

PATIENCE = float(os.environ.get("BLOCKREPL_TEST_PATIENCE", "1"))


def patient(seconds: float) -> float:
    """A limit, on this machine."""
    return seconds * PATIENCE


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The time limits of whole tests too: the default of setup.cfg, or what the test says."""
    usual_s = float(config.getini("timeout"))
    for item in items:
        marker = item.get_closest_marker("timeout")
        item.add_marker(pytest.mark.timeout(patient(marker.args[0] if marker else usual_s)), append=False)
