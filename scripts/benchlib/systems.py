"""What a system under measurement is: a context manager that yields how to reach it and what to watch."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.benchlib.fio import BlockTarget, FileTarget, IscsiTarget, NbdTarget
from scripts.benchlib.process import NotAvailableError
from scripts.benchlib.workspace import Workspace


@dataclass(frozen=True)
class Lag:
    """How far the secondaries are behind the acknowledged writes."""

    writes: int
    bytes: int


@dataclass(frozen=True)
class Running:
    """A system that serves. ``pids`` are the roots of its server processes by name; children are counted with them.

    ``files`` are what it writes: synced between measurements, so that nobody pays for his predecessor's dirty pages.
    ``lag`` is there for an asynchronous copy only.
    """

    target: NbdTarget | BlockTarget | FileTarget | IscsiTarget
    pids: dict[str, int]
    files: tuple[Path, ...]
    lag: Callable[[], Lag] | None = field(default=None)


Factory = Callable[[Workspace], AbstractContextManager[Running]]


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise NotAvailableError(f"{what} needs root")
