"""What the hosts of the roles need from the outside: links, time, workers. The asyncio shell has one set of them,
the simulator another; the hosts are the same code in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from blockrepl.block import Buffer, WriteBatch
from blockrepl.chunks import Chunk
from blockrepl.storage.undo import Saved, Undo

SaveBitmaps = Callable[[Callable[[], None]], None]
"""Make every bitmap of the node durable, then call back on the loop; raises StorageError."""


class Links(Protocol):
    """Sending and closing, by link number. What is sent on a link that is gone is dropped."""

    def send(self, link: int, buffers: Sequence[Buffer], chunk: Chunk | None) -> None:
        """Queue; `settle` pushes it out."""

    def close(self, link: int, reason: str, last_words: bytes) -> None:
        """Close; unread input is dropped; the role's `lost` is called afterwards."""

    def queued_bytes(self, link: int) -> int:
        """What waits for the peer to read, bytes."""

    def settle(self) -> None:
        """End of an event: push out what was queued."""


class Clock(Protocol):
    """Time, three ways."""

    def now_s(self) -> float:
        """Monotonic, seconds."""

    def boot_ns(self) -> int:
        """CLOCK_BOOTTIME, nanoseconds: counts while suspended too."""

    def wall_ns(self) -> int:
        """Since 1970; may jump. For people only."""


class Workers(Protocol):
    """Blocking work off the loop."""

    def run(self, function: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """Call ``function`` elsewhere, then ``done(result, error)`` on the loop."""

    def later(self, function: Callable[[], None]) -> None:
        """Call ``function`` on the loop, after what waits there now."""


class Image(Protocol):
    """A volume's bytes: `storage.image.ImageFile`, or the simulator's. Offsets and lengths in bytes; raises OSError."""

    fd: int
    size_bytes: int

    def pwrite(self, offset_bytes: int, data: memoryview) -> None:
        """Into the page cache."""

    def store(self, batch: WriteBatch) -> None:
        """A whole batch into the page cache; sets its errors."""

    def zero(self, offset_bytes: int, length_bytes: int, *, allocate: bool) -> None:
        """Reads as zeroes afterwards."""

    def trim(self, offset_bytes: int, length_bytes: int) -> None:
        """Reads as zeroes afterwards; gives its space back."""

    def metadata(self) -> bytes:
        """What `set_metadata` stored last; b"" for nothing."""

    def set_metadata(self, data: bytes | memoryview) -> None:
        """Replace the metadata, durably, whole or not at all."""

    def read_cached(self, offset_bytes: int, view: memoryview) -> bool:
        """Fill from the page cache only; False when it is not all there."""

    def read(self, offset_bytes: int, view: memoryview) -> None:
        """Fill, from the disk if need be."""

    def allocation(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int, bool]]:
        """Extents as (offset, length, is_data)."""


class Disk(Protocol):
    """`storage.executor.DiskThread`, or the simulator's."""

    def sync(self, fd: int, done: Callable[[OSError | None], None]) -> None:
        """Make durable all that was written to ``fd`` before; then ``done`` on the loop."""


class UndoStore(Protocol):
    """A secondary's way back: `storage.undo_file.UndoFile`, or the simulator's."""

    undo: Undo | None

    def begin(self, copy: int, done: Callable[[OSError | None], None]) -> None:
        """A new one, for the copy whose START is ``copy``; ``done`` when that is durable."""

    def save(self, blocks: list[Saved], done: Callable[[OSError | None], None]) -> None:
        """Make old blocks durable, then ``done``."""

    def drop(self) -> None:
        """There is nothing to go back to any more."""

    def entries(self) -> Iterator[Saved]:
        """What is saved; blocks."""

    @property
    def used_bytes(self) -> int:
        """What it takes on disk."""


class Spills(Protocol):
    """`storage.spill.SpillDirectory`, or the simulator's: records of primaries that are away. All methods block."""

    def append(self, sender: int, records: Sequence[tuple[int, bytes]]) -> None:
        """Add (last number, record) pairs, durably. Raises StorageError."""

    def after(self, sender: int, number: int, limit_bytes: int) -> Sequence[Any]:
        """What is above ``number``: at least one, until it reaches ``limit_bytes``; each has ``last``."""

    def read(self, sender: int, wanted: Sequence[Any]) -> list[bytes]:
        """The records. Raises StorageError."""

    def drop(self, sender: int) -> None:
        """Forget what is kept for a primary. Raises StorageError."""


class Log(Protocol):
    """Where events go."""

    def __call__(self, text: str, fields: dict[str, object]) -> None:
        """One event."""
