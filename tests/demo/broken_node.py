"""A node with a planted bug: as a secondary it stores records in its volumes as they come, validated or not.

    python -m tests.demo.broken_node serve FILE --node NAME

Each volume by itself stays in order; over the secondaries nothing keeps the order any more, as with independent
asynchronous copies: whoever sits behind the shorter line is ahead. The demo's check must notice.
"""

from __future__ import annotations

from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.cli.main import main
from blockrepl.formats.record import RecordHead
from blockrepl.replication.actions import Action, Apply
from blockrepl.replication.secondary import Secondary


def plant() -> None:
    """Break rule 14 of the protocol in this process: apply at once instead of after VALIDATE."""
    taken, applied = Secondary.record, Secondary.was_applied

    def record(
        self: Secondary, link: int, head: RecordHead, epoch: int, record: memoryview, chunk: Chunk
    ) -> list[Action]:
        actions = taken(self, link, head, epoch, record, chunk)
        return [*actions, Apply(head.last)] if actions else actions

    def was_applied(self: Secondary, number: int, now_s: float) -> list[Action]:
        # It does not know what it does: it believes to have applied no more than was validated.
        return applied(self, min(number, self.validated), now_s)

    broken: Any = Secondary
    broken.record, broken.was_applied = record, was_applied


if __name__ == "__main__":
    plant()
    main()
