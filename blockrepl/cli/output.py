"""What every command prints with: tables on stdout, errors on stderr, JSON for programs."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import msgspec
from rich.console import Console

from blockrepl.errors import BlockreplError
from blockrepl.node.control_messages import plain

PIPE_COLUMNS = 200  # a table that goes into a file or a pipe must not be cut at 80


def console() -> Console:
    """For stdout as it is now; wide when nobody watches."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=shutil.get_terminal_size((PIPE_COLUMNS, 25)).columns)


def error_console() -> Console:
    """For progress and remarks: stdout stays for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One document; integers in bytes, null for unknown."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value, enc_hook=plain), indent=2).decode() + "\n")
    sys.stdout.flush()


def print_error(error: BlockreplError) -> None:
    """``blockrepl: message``, and what to do next."""
    sys.stderr.write(f"blockrepl: {error}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")
    sys.stderr.flush()


def bytes_text(count: int | None) -> str:
    """512 → "512 B", 1536 → "1.5 KiB", None → "-"."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) or unit == "B" else f"{value:.1f} {unit}"


def number_text(value: float | int | None) -> str:
    """An integer as it is, seconds with milliseconds, None as "-"."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
