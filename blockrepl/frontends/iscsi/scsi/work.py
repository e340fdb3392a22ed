"""Batches of writes that remember their tasks, and chunks that are released together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blockrepl.block import WriteBatch
from blockrepl.chunks import Chunk
from blockrepl.errors import BlockError
from blockrepl.frontends.iscsi.scsi.ranges import Claim
from blockrepl.frontends.iscsi.task import Task


class Chunks:
    """Several chunks with one use each, released as if they were one chunk with ``uses`` users."""

    __slots__ = ("chunks", "uses")

    def __init__(self, chunks: list[Chunk], uses: int = 1) -> None:
        self.chunks = chunks
        self.uses = uses

    def release(self) -> None:
        """See `Chunk.release`."""
        self.uses -= 1
        if not self.uses:
            for chunk in self.chunks:
                chunk.release()
            self.chunks = []


class TaskBatch(WriteBatch):
    """Plain writes of one nexus. ``cookies`` are places in ``tasks``: a task may have several entries."""

    __slots__ = ("claim", "tasks")

    def __init__(self, done: Callable[[WriteBatch], None]) -> None:
        super().__init__(done)
        self.tasks: list[Task] = []
        self.claim: Claim | None = None

    def first_errors(self) -> dict[int, BlockError]:
        """Place of a task → the first error of its entries."""
        found: dict[int, BlockError] = {}
        for cookie, error in zip(self.cookies, self.errors or (), strict=True):
            if error is not None:
                found.setdefault(cookie, error)
        return found


def joined(views: Sequence[memoryview]) -> memoryview:
    """The Data-Out as one view; copies only if it came in pieces."""
    return views[0] if len(views) == 1 else memoryview(b"".join(views))


def cut(views: Sequence[memoryview], size_bytes: int, block_bytes: int) -> list[memoryview]:
    """The first ``size_bytes`` of the Data-Out, in pieces that are whole blocks."""
    pieces = []
    left = size_bytes
    for view in views:
        if left <= 0:
            break
        piece = view[:left] if len(view) > left else view
        pieces.append(piece)
        left -= len(piece)
    if any(len(piece) % block_bytes for piece in pieces):
        return [memoryview(b"".join(pieces))]
    return pieces
