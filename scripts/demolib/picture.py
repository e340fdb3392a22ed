"""What people see: steps as they happen, and below them, on a terminal, the group as it is now."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scripts.demolib.group import Group as NodeGroup
from tests.demo.records import Ledger

POLL_S = 0.3
_STATE_STYLES = {
    "down": "bold red",
    "taken over": "bold green",
    "live": "green",
    "serving": "green",
    "following": "green",
}


class Picture:
    """Prints steps; on a terminal it keeps a table of the nodes below them. Safe to call from any thread."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began_s = time.monotonic()
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched: tuple[NodeGroup, Ledger] | None = None

    def __enter__(self) -> Picture:
        if self._live is not None:
            self._live.start()
            self._thread = threading.Thread(target=self._refresh, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(5)
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One step."""
        stamp = f"{time.monotonic() - self._began_s:6.1f} s  "
        style = "bold red" if text.startswith("DISASTER") else "cyan" if text.startswith("$") else ""
        self.console.print(Text(stamp, "dim") + Text(text, style), soft_wrap=True)

    def title(self, text: str) -> None:
        """A new chapter."""
        self.console.print()
        self.console.rule(Text(text, "bold"), align="left")

    def watch(self, group: NodeGroup, ledger: Ledger) -> None:
        """Whose state the table shows from now on."""
        self._watched = group, ledger

    def unwatch(self) -> None:
        """Nothing runs."""
        self._watched = None
        if self._live is not None:
            self._live.update("")

    def _refresh(self) -> None:
        while not self._end.wait(POLL_S):
            watched = self._watched
            if watched is None or self._live is None:
                continue
            with suppress(OSError, ValueError):  # the story may end while we look
                image = _draw(*watched)
                if self._watched is watched:
                    self._live.update(image)


def _draw(group: NodeGroup, ledger: Ledger) -> RenderableType:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # fits 80 columns
    for heading in ("NODE", "", "STATE"):
        table.add_column(heading, no_wrap=True)
    for heading in ("NUMBERED", "DURABLE", "PREPARED", "VALIDATED", "APPLIED", "LAG", "JOURNAL"):
        table.add_column(heading, justify="right", no_wrap=True)
    statuses = group.statuses()
    lags = {peer["node"]: peer.get("lag_writes") for status in statuses for peer in status.get("peers") or []}
    for status in statuses:
        table.add_row(*_cells(status, lags))
    last_a, last_b = ledger.read()
    counts = Text(f"acknowledged: record {last_a} on data, record {last_b} on log", "bold")
    return Group(table, counts)


def _cells(status: dict[str, Any], lags: dict[str, Any]) -> list[RenderableType]:
    marks = status.get("watermarks") or {}
    state = str(status.get("state", "?"))
    journal = status.get("journal")
    fill = f"{100 * journal['used_bytes'] // journal['size_bytes']}%" if journal else "-"
    lag = lags.get(status["node"]) if status["role"] == "secondary" else None
    keys = ("numbered", "durable", "prepared", "validated", "applied")
    return [
        status["node"], status["role"][0].upper(), Text(state, _STATE_STYLES.get(state, "yellow")),
        *(_number(marks.get(key)) for key in keys), _number(lag), fill,
    ]  # fmt: skip


def _number(value: Any) -> str:
    return "-" if value is None else str(value)
