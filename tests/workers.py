"""How tests are shared out to the processes of pytest-xdist (`--dist loadfile`): a file to a process, long files first.

What a file's tests have in common (the demo's one directory, its memory limits) so stays in one process, and what takes
long does not come last, when the other process has nothing left to do.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Files that take more than half a minute on a quiet machine, the longest first.
LONG = (
    "tests/torture/test_torture.py", "tests/sim/test_seeds.py", "tests/iscsi/test_suite.py",
    "tests/system/test_pair.py", "tests/demo/test_demo.py", "tests/system/test_kill.py", "tests/sim/test_planted.py",
    "tests/system/test_volumes_mode.py", "tests/system/test_takeover.py", "tests/system/test_bounds.py",
    "tests/lab/test_iscsi.py", "tests/iscsi/test_storm.py", "tests/sim/model/test_model.py",
)  # fmt: skip
TOGETHER = ("tests/lab/",)  # folders whose files share a guest that takes long to boot


class LongestFirst(LoadFileScheduling):
    """Files in the order of `LONG`, then as they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        for folder in TOGETHER:
            if nodeid.startswith(folder):
                return folder
        return super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LongestFirst | None:
    """Ours for `--dist loadfile`."""
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # not by the number of tests: the order of collection, which is ours
    return LongestFirst(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, for workers only: who runs tests one by one wants the quick ones first."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.nodeid.split("::", 1)[0], len(LONG)))
