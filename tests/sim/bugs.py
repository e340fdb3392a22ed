"""All planted bugs, by name."""

from __future__ import annotations

from tests.sim import planted, planted_links, planted_superset, planted_volumes
from tests.sim.group import Options
from tests.sim.planted import Planted

PLANTED = planted.PLANTED + planted_links.PLANTED + planted_volumes.PLANTED + planted_superset.PLANTED
NAMES = [bug.__name__ for bug, _ in PLANTED]


def by_name(name: str) -> Planted:
    """A planted bug."""
    return next(bug for bug, _ in PLANTED if bug.__name__ == name)


def options_for(name: str) -> Options:
    """The runs in which it shows."""
    return next(options for bug, options in PLANTED if bug.__name__ == name)
