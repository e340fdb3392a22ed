"""What a primary copies in a resync: the blocks that the bitmaps say, or those that a verify finds (PROTOCOL, rule 19).

A block is read under the overlap lock that digests use, and travels as an ordinary record with the flag COPY, so a late
old copy can never overwrite a newer update.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from blockrepl.bitmap import Bitmap

CHUNK_BYTES = 256 << 10  # one copy record
WINDOW_CHUNKS = 8  # being read, or not acknowledged yet
DIGEST_BYTES = 1 << 20  # blocks compared by one digest record
DIGEST_WINDOW = 4
DIGEST_AGAIN_S = 10.0  # a secondary that restarts forgets what it was asked

Range = tuple[int, int, int]
"""(volume, start, end) in bytes."""


class Copier:
    """One resync at one primary: what is to be copied, what is on its way, what is done.

    Invariant: `cursor` is a place before which everything is copied and acknowledged.
    """

    def __init__(
        self, resync: int, bitmaps: Mapping[int, Bitmap], *, verify: bool, rate_bytes: int, cursor: tuple[int, int],
        now_s: float, compare: bool = False,
    ) -> None:  # fmt: skip
        """``cursor``: (volume, block) to go on from; (0, 0) for the beginning. ``rate_bytes``: a second, 0 for any.

        ``verify``: every block is compared, and copied if it differs; ``compare``: so are those that the bitmaps say.
        """
        self.resync = resync
        self.rate_bytes = rate_bytes
        self.verify = verify
        self.compares = verify or compare
        self.copied_bytes = 0
        self.compared_bytes = 0
        self._bitmaps = bitmaps
        self._found: deque[Range] = deque()  # differences
        self._here: set[tuple[int, int]] = set()  # (volume, start) of those that only the intermediate volume lacks
        self._flying: deque[Range] = deque()  # handed out and not acknowledged, in order
        self._digests: dict[tuple[int, int], tuple[int, float]] = {}  # (volume, start) → end, when asked; no answer yet
        self._again: deque[Range] = deque()  # digests to be asked again
        self._todo = self._whole() if verify else self._dirty(cursor)
        self._cursor = cursor
        self._exhausted = False
        self._metadata = sorted(bitmaps)  # volumes whose metadata is to be copied
        self._metadata_flying: set[int] = set()
        self._budget_bytes = 0.0
        self._budget_s = now_s
        self.total_bytes = (
            sum(bitmap.size_bytes for bitmap in bitmaps.values())
            if verify
            else sum(end - start for _, start, end in self._dirty(cursor))
        )

    def _whole(self) -> Iterator[Range]:
        for volume, bitmap in sorted(self._bitmaps.items()):
            for start in range(0, bitmap.size_bytes, DIGEST_BYTES):
                yield volume, start, min(start + DIGEST_BYTES, bitmap.size_bytes)

    def _dirty(self, cursor: tuple[int, int]) -> Iterator[Range]:
        for volume, bitmap in sorted(self._bitmaps.items()):
            if volume < cursor[0]:
                continue
            first_block = cursor[1] if volume == cursor[0] else 0
            most = max(1, CHUNK_BYTES // bitmap.block_bytes)
            for block, count in bitmap.runs(first_block, most):
                start = block * bitmap.block_bytes
                yield volume, start, min(start + count * bitmap.block_bytes, bitmap.size_bytes)

    def next_copy(self, now_s: float) -> Range | None:
        """A range to be copied now; it is under way until `acknowledged`."""
        if len(self._flying) >= WINDOW_CHUNKS or not self._may(now_s):
            return None
        found = self._found.popleft() if self._found else (None if self.compares else self._next())
        if found is None:
            return None
        self._flying.append(found)
        self._budget_bytes -= found[2] - found[1]
        return found

    def next_metadata(self) -> int | None:
        """A volume whose metadata is to be copied now: no bit says whether it differs, and it is small."""
        if not self._metadata:
            return None
        volume = self._metadata.pop(0)
        self._metadata_flying.add(volume)
        return volume

    def metadata_done(self, volume: int) -> None:
        """Its copy is durable in the journal, or there is none."""
        self._metadata_flying.discard(volume)

    def next_digest(self, now_s: float) -> Range | None:
        """A range to be compared now; it is under way until `compared`. One that is not answered is asked again."""
        if not self.compares:
            return None
        for (volume, start), (end, asked_s) in self._digests.items():
            if now_s - asked_s >= DIGEST_AGAIN_S:
                self._digests[volume, start] = end, now_s
                return volume, start, end
        if len(self._digests) >= DIGEST_WINDOW or len(self._found) >= WINDOW_CHUNKS:
            return None
        found = self._again.popleft() if self._again else self._next()
        if found is not None:
            self._digests[found[0], found[1]] = found[2], now_s
        return found

    def _next(self) -> Range | None:
        found = next(self._todo, None)
        if found is None:
            self._exhausted = True
        return found

    def _may(self, now_s: float) -> bool:
        """Whether the rate allows one more."""
        if not self.rate_bytes:
            return True
        self._budget_bytes += (now_s - self._budget_s) * self.rate_bytes
        self._budget_bytes = min(self._budget_bytes, max(self.rate_bytes, CHUNK_BYTES))
        self._budget_s = now_s
        return self._budget_bytes > 0

    def compared(
        self, volume: int, start: int, different: list[int], block_bytes: int, *, here: Sequence[int] = ()
    ) -> bool:
        """The secondary has compared a range, and the intermediate (``here``: what differs there only).

        False: it was not asked for by this resync.
        """
        asked = self._digests.pop((volume, start), None)
        if asked is None:
            return False
        end = asked[0]
        self.compared_bytes += end - start
        size_bytes = self._bitmaps[volume].size_bytes
        self._here.difference_update((volume, offset) for offset in different)
        self._here.update((volume, offset) for offset in here)
        for offset in (*different, *here):
            self._found.append((volume, offset, min(offset + block_bytes, size_bytes)))
        return True

    def is_here(self, volume: int, start: int) -> bool:
        """Whether a copy is for the intermediate volume only."""
        return (volume, start) in self._here

    def acknowledged(self, volume: int, start: int) -> None:
        """A copy is durable in the journal."""
        for index, each in enumerate(self._flying):
            if each[:2] == (volume, start):
                del self._flying[index]
                self.copied_bytes += each[2] - start
                break
        if not self.compares:
            at = self._flying[0][:2] if self._flying else (volume, start)
            self._cursor = at[0], at[1] // self._bitmaps[at[0]].block_bytes

    def interrupted(self, copies: set[tuple[int, int]], digests: set[tuple[int, int]]) -> None:
        """The link broke. What is in ``copies`` and ``digests`` will be sent again; the rest starts anew."""
        for each in list(self._flying):
            if each[:2] not in copies:
                self._flying.remove(each)
                self._found.appendleft(each)
        self._metadata = sorted({*self._metadata, *self._metadata_flying})
        self._metadata_flying.clear()
        for (volume, start), (end, _) in list(self._digests.items()):
            if (volume, start) not in digests:
                del self._digests[volume, start]
                self._again.append((volume, start, end))

    @property
    def cursor(self) -> tuple[int, int]:
        """(volume, block) to go on from after a restart; what compares begins anew."""
        return (0, 0) if self.compares or self._found else self._cursor

    @property
    def done(self) -> bool:
        """Everything is copied, and acknowledged."""
        metadata = self._metadata or self._metadata_flying
        return self._exhausted and not (self._flying or self._found or self._digests or self._again or metadata)
