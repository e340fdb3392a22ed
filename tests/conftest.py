"""For every test: nothing is timed, so hypothesis has no deadline either."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

pytest_plugins = ("tests.patience", "tests.workers", "tests.second_chance", "tests.leftovers")

# Ignored in what a shell runs in the background; so it would be in whatever tests start and mean to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest-xdist sets it for its workers; commands are to be as wide as in a pipe.
os.environ.pop("COLUMNS", None)

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell's background job starts with SIGINT ignored, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
