"""A node with a planted bug that the torture must notice.

    python -m tests.torture.broken_node BUG serve FILE --node NAME

unsynced: what is durable is only said to be; kill -9 does not show it, a power cut does. unordered: secondaries store
what comes without waiting for each other.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from blockrepl.cli.main import main
from blockrepl.storage.executor import write_all
from tests.demo.broken_node import plant as plant_unordered

_journal: Any = importlib.import_module("blockrepl.storage.journal_file")


def plant_unsynced() -> None:
    """Rule 1 of the protocol: nothing is synced."""
    os.fdatasync = lambda fd: None
    _journal.write_durably = write_all


BUGS: dict[str, Callable[[], None]] = {"unsynced": plant_unsynced, "unordered": plant_unordered}

if __name__ == "__main__":
    BUGS[sys.argv.pop(1)]()
    main()
