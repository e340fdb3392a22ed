"""The ordered writer, a process: record i durably on A and then, after that, on B. Ends at the first error.

    python -m tests.demo.writer LEDGER RUN_HEX A B [LAST]

A and B are files (written with O_DSYNC) or nbd://HOST:PORT/EXPORT (written with FUA). Each acknowledged write is noted
in the ledger before the next one is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tests.demo.nbd_client import NbdVolume
from tests.demo.records import RECORD_BYTES, Ledger, build

Write = Callable[[int, bytes], None]


def target(name: str) -> Write:
    """What puts a record durably at its place."""
    if name.startswith("nbd://"):
        volume = NbdVolume(name)
        return lambda index, record: volume.write((index - 1) * RECORD_BYTES, record, durable=True)
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_DSYNC | os.O_CLOEXEC, 0o600)

    def write(index: int, record: bytes) -> None:
        if os.pwrite(fd, record, (index - 1) * RECORD_BYTES) != len(record):
            raise OSError(f"{name}: short write")

    return write


def run(ledger: Ledger, run_id: bytes, targets: list[Write], last: int) -> None:
    """Write until ``last`` or an OSError."""
    for index in range(1, last + 1):
        record = build(run_id, index)
        for volume, write in enumerate(targets):
            write(index, record)
            ledger.note(volume, index)


def main(arguments: list[str]) -> int:
    """0 when it came to the end, 1 when the disk died before."""
    ledger, run_hex, name_a, name_b, *last = arguments
    try:
        run(
            Ledger(Path(ledger)),
            bytes.fromhex(run_hex),
            [target(name_a), target(name_b)],
            int(last[0]) if last else 1 << 40,
        )
    except OSError as error:
        print(f"writer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
