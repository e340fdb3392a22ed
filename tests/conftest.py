"""For every test: nothing is timed, so hypothesis has no deadline either."""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = ("tests.patience", "tests.workers", "tests.second_chance", "tests.leftovers")

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
