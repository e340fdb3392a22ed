"""What crosses the layers between front ends and the data path: batches of commands, and the volume that takes them.

The unit is the batch: what one front end decoded from one chunk of input. Cost is per batch, not per command, so
batches are columns and completion is one callback for all of it. Reads do not travel in batches: they go straight to
the image, because a P-VOL never holds what the journal does not (PROTOCOL, rule 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum, IntFlag

from blockrepl.chunks import Releasable
from blockrepl.errors import BlockError

Buffer = bytes | bytearray | memoryview


class Op(IntEnum):
    """What a command of a write batch does. The values stand in journal entries: never renumber them."""

    WRITE = 1
    ZERO = 2  # write zeroes
    TRIM = 3  # "zero, may deallocate": reads as zeroes on every copy (PROTOCOL, rule 5)
    # 4 is a digest (`formats.record`)
    METADATA = 5  # replaces what front ends keep with the volume: a batch of its own, offset 0, not data


MAX_METADATA_BYTES = 1 << 16


class WriteFlag(IntFlag):
    """Flags of one command. The values stand in journal entries."""

    NONE = 0
    FUA = 1  # complete only when durable in journal and P-VOL
    NO_HOLE = 2  # a zero must stay allocated


class WriteBatch:
    """Writes, zeroes and trims that came together, in the order in which they are to win.

    Columns of one length; index i is one command. ``payloads[i]`` is a view for WRITE and METADATA, and None
    otherwise. The views look into ``chunk``, of which the batch is a user: whoever completes the batch releases it.

    ``done(batch)`` is called once, on the event loop, when `Volume.submit` returned False. ``errors`` is then None
    (all well) or one entry per command, None where that command is well.
    """

    __slots__ = (
        "chunk", "cookies", "done", "errors", "flags", "fua", "lengths", "offsets", "ops", "payloads", "size_bytes",
    )  # fmt: skip

    def __init__(self, done: Callable[[WriteBatch], None], chunk: Releasable | None = None) -> None:
        self.ops: list[int] = []
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.flags: list[int] = []
        self.cookies: list[int] = []
        self.payloads: list[memoryview | None] = []
        self.size_bytes = 0  # payload bytes of the batch; the front end keeps it right
        self.fua = False  # any command has FUA
        self.chunk = chunk
        self.done = done
        self.errors: list[BlockError | None] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def fail(self, error: BlockError) -> None:
        """Every command of the batch failed with ``error``."""
        self.errors = [error] * len(self.offsets)

    def release(self) -> None:
        """The payloads are no longer needed."""
        chunk = self.chunk
        if chunk is not None:
            self.chunk = None
            chunk.release()


class Volume(ABC):
    """A block device as front ends see it. All methods are called on the event loop and never block.

    A front end checks every command once, at its edge: range, block multiple where it promises one, writability.
    Behind it these are asserted only.
    """

    name: str
    size_bytes: int
    block_size_bytes: int
    writable: bool
    max_write_bytes: int = 32 << 20  # of one command's payload; zeroes and trims may be longer
    atomic_bytes: int = 0  # a write up to this survives a crash whole or not at all

    @abstractmethod
    def submit(self, batch: WriteBatch) -> bool:
        """Take a batch.

        True: it is complete, ``batch.errors`` is set, the chunk is released, and ``done`` is not called. False:
        ``done`` is called later. Batches that overlap are stored in the order submitted.
        """

    @abstractmethod
    def read(self, offset_bytes: int, view: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        """Fill ``view`` from ``offset_bytes`` on. True: filled, ``done`` is not called.

        False: not in the page cache; a worker fills it, and ``done`` is called on the loop. Raises BlockError when the
        read fails at once.
        """

    @abstractmethod
    def flush(self, done: Callable[[BlockError | None], None]) -> None:
        """Make every write that completed before this call durable (journal and image), then call ``done``."""

    @property
    @abstractmethod
    def congested(self) -> bool:
        """True while the queue behind the volume is full: a front end stops reading from its hosts."""

    @abstractmethod
    def when_relieved(self, resume: Callable[[], None]) -> None:
        """Call ``resume`` once on the loop when ``congested`` has become False."""

    def allocation(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int, bool]] | None:
        """Extents as (offset, length, is_data) that cover the range, or None when unknown (all data)."""
        return None

    def metadata(self) -> bytes:
        """What the last METADATA that completed stored; b"" when there was none. Small: may be read on the loop."""
        return b""
