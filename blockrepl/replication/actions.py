"""What a role asks its host to do. A host performs them in order; nothing here touches a socket, a disk or a clock.

Links are named by small integers that the host gives and never reuses within a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blockrepl.block import Buffer, WriteBatch
from blockrepl.chunks import Chunk
from blockrepl.formats.link import Epoch
from blockrepl.formats.record import RecordHead


@dataclass(slots=True)
class Send:
    """Send buffers on a link, in order. One use of ``chunk`` passes on."""

    link: int
    buffers: Sequence[Buffer]
    chunk: Chunk | None = None


@dataclass(slots=True)
class Close:
    """Close a link; unread input is dropped. ``last_words`` is a whole REFUSED message or empty."""

    link: int
    reason: str
    last_words: bytes = b""


@dataclass(slots=True)
class Append:
    """Append a record to this node's journal. Answered by `durable` (intermediate) or by the answer to `Sync`."""

    head: RecordHead
    record: memoryview
    chunk: Chunk


@dataclass(slots=True)
class AppendNote:
    """Append the note "prepared ``number`` in this epoch" to a secondary's journal and sync; answered by `noted`.

    ``received``: the last record that stands before it.
    """

    number: int
    epoch: int
    received: int


@dataclass(slots=True)
class SyncJournal:
    """Sync all that was appended; answered by `synced(token)`."""

    token: int


@dataclass(slots=True)
class SaveState:
    """Write the role's `state` durably; answered by `saved(token)`."""

    token: int


@dataclass(slots=True)
class SaveBits:
    """Make every bitmap of this node durable as it is now; answered by `bits_saved(token)`."""

    token: int


@dataclass(slots=True)
class MarkJournal:
    """Set the hop-2 bits of every record up to ``through`` that is above ``after``, or above its sender's number in
    ``checkpoints``, durably; answered by `journal_marked(token)`.
    """

    after: int
    through: int
    checkpoints: dict[int, int]
    token: int


@dataclass(slots=True)
class CountAbove:
    """Count hosts' writes above ``number`` that are durable in the journal; answered by `counted(token, counts)`."""

    number: int
    token: int


@dataclass(slots=True)
class Counts:
    """What lies above a number in a journal. Bytes are those of entries and payload, times of the wall clock."""

    writes: int = 0
    size_bytes: int = 0
    kept_ns: int = 0  # when the last record not above was numbered; 0 for unknown
    newest_ns: int = 0
    whole: bool = False  # the journal still holds everything above the number


@dataclass(slots=True)
class Spill:
    """Keep the records of a primary that is away beside the ring, durably; answered by `saved(token)`."""

    sender: int
    after: int
    through: int
    token: int


@dataclass(slots=True)
class DropSpill:
    """A primary has everything that was kept beside the ring for it."""

    sender: int


@dataclass(slots=True)
class CopyOwn:
    """Volumes mode: copy what the hop-2 bitmaps say from the intermediate's volumes; then `pairing.own_copied`."""

    resync: int


@dataclass(slots=True)
class Forget:
    """Give up every record of this node's journal and save the role's `state`, in one write; then `saved(token)`."""

    token: int


@dataclass(slots=True)
class Reformed:
    """The state says another group now: the node builds this role anew from it, or goes on with it."""


@dataclass(slots=True)
class Transmit:
    """Send records of stream ``node`` above ``after`` on ``link``, at most ``limit_bytes`` of frames.

    Some helping of it: the host chooses how much. Answered by `transmitted(node, link, last number, frame bytes)`.
    """

    node: int
    link: int
    after: int
    through: int
    limit_bytes: int


@dataclass(slots=True)
class Replay:
    """Send a primary its own records above ``after`` up to ``through``, then the message ``end``."""

    link: int
    sender: int
    after: int
    through: int
    end: bytes


@dataclass(slots=True)
class Truncate:
    """Discard records above ``number`` from this node's journal and save the role's `state`, in one durable write.

    With ``dry_run`` only count them. Answered by `truncated(token, writes, bytes, last record not above it)`.
    """

    number: int
    token: int
    dry_run: bool


@dataclass(slots=True)
class Apply:
    """Store all held records up to ``number`` in the S-VOLs, in order; answered by `was_applied(number)`.

    With ``undo`` each block is saved durably before it is overwritten for the first time.
    """

    number: int
    undo: bool = False


@dataclass(slots=True)
class HaltApply:
    """Stop applying, between two records; answered by `done(token)`. What was asked for before is forgotten."""

    token: int


@dataclass(slots=True)
class OpenUndo:
    """Begin a new undo file, durably, for the copy whose START is ``copy``; answered by `done(token)`."""

    copy: int
    token: int


@dataclass(slots=True)
class RestoreUndo:
    """Put back every block that the undo file has, and sync the images; answered by `done(token)`."""

    token: int


@dataclass(slots=True)
class DropUndo:
    """There is nothing to go back to any more: the undo file may go."""


@dataclass(slots=True)
class Withdraw:
    """No host uses this node's volumes any more, and none of their writes is under way; answered by `done(token)`."""

    token: int


@dataclass(slots=True)
class Publish:
    """Hosts may use this node's volumes: the role's state says how (active, or split)."""


@dataclass(slots=True)
class BecomeSource:
    """Reform: this node's primary suspends, durably, with the bits of all that the others may lack; `done(token)`."""

    epoch: Epoch
    number: int
    direction: int
    token: int


@dataclass(slots=True)
class SyncVolumes:
    """Sync the images of this node; answered by `volumes_synced(token)`. The number is taken before the sync."""

    token: int


@dataclass(slots=True)
class StoreBatch:
    """The batch is durable in the journal: store it in its P-VOL, then complete it to the host if ``report``."""

    volume: int
    batch: WriteBatch
    report: bool


@dataclass(slots=True)
class StoreRecord:
    """Replay: store this record in the P-VOLs."""

    head: RecordHead
    record: memoryview


@dataclass(slots=True)
class FailBatch:
    """Complete the batch to the host with an I/O error; its payload is still needed."""

    volume: int
    batch: WriteBatch
    reason: str


@dataclass(slots=True)
class DigestBlocks:
    """Read a range of a P-VOL and digest its blocks; answered by `digest_ready(token, digests)`."""

    volume: int
    offset_bytes: int
    length_bytes: int
    token: int


@dataclass(slots=True)
class ReadBlocks:
    """Read a range of a P-VOL, to be copied; answered by `blocks_read(token, data)`."""

    volume: int
    offset_bytes: int
    length_bytes: int
    token: int


@dataclass(slots=True)
class ReadMetadata:
    """Read what front ends keep with a volume, to be copied; answered by `metadata_read(token, data)`."""

    volume: int
    token: int


@dataclass(slots=True)
class Digested:
    """The secondary has compared a digest record; ``fields`` as in link message DIGESTED."""

    fields: dict[str, Any]


@dataclass(slots=True)
class TakeConfig:
    """The configuration with this digest is in effect, from ``number`` on."""

    digest: int
    number: int


@dataclass(slots=True)
class Event:
    """Something people want to know: goes to the log and to status."""

    text: str
    fields: dict[str, object] = field(default_factory=dict)


Action = (
    Send | Close | Append | AppendNote | SyncJournal | SaveState | Transmit | Replay | Truncate | Apply
    | HaltApply | OpenUndo | RestoreUndo | DropUndo | Withdraw | Publish | BecomeSource | SaveBits | MarkJournal
    | CopyOwn | CountAbove | Spill | DropSpill | Forget | Reformed | SyncVolumes | StoreBatch | StoreRecord | FailBatch
    | DigestBlocks | ReadBlocks | ReadMetadata | Digested | TakeConfig | Event
)  # fmt: skip
