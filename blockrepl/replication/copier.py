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
ANSWER_S = 10.0  # a comparison that was journaled this long ago, and not answered, is asked for again

Range = tuple[int, int, int]
"""(volume, start, end) in bytes."""
Key = tuple[int, int]
"""(volume, start in bytes) of a range under way."""


class Copier:
    """One resync at one primary: what is to be copied, what is on its way, what is done.

    Invariant: `cursor` is a place before which everything is copied and acknowledged.
    """

    def __init__(
        self, resync: int, bitmaps: Mapping[int, Bitmap], *, verify: bool, rate_bytes: int, cursor: tuple[int, int],
        now_s: float, compare: bool = False,
    ) -> None:  # fmt: skip
        """``cursor``: (volume, block) to go on from; (0, 0) for the beginning. ``rate_bytes``: a second, 0 for any.

        The rate is that of bytes read, be it for copies or for digests. ``verify``: every block is compared, and
        copied if it differs; ``compare``: so are those that the bitmaps say.
        """
        self.resync = resync
        self.rate_bytes = rate_bytes
        self.verify = verify
        self.compares = verify or compare
        self.copied_bytes = 0
        self.compared_bytes = 0
        self._bitmaps = bitmaps
        self._found: deque[Range] = deque()  # differences, and copies to be made again
        self._here: set[Key] = set()  # those that only the intermediate volume lacks
        self._flying: dict[Key, int] = {}  # copies handed out and not acknowledged → end
        self._digests: dict[Key, int] = {}  # asked and not answered → end
        self._journaled_s: dict[Key, float] = {}  # digests that are durable in the journal, since when
        self._again: deque[Range] = deque()  # digests to be asked again
        self._todo = self._whole() if verify else self._dirty(cursor)
        self._reached = cursor  # (volume, block) up to which the bitmaps were looked through
        self._exhausted = False
        self._metadata = sorted(bitmaps)  # volumes whose metadata is to be copied
        self._metadata_flying: set[int] = set()
        self._budget_bytes = 0.0
        self._budget_s = now_s
        self.total_bytes = (
            sum(bitmap.size_bytes for bitmap in bitmaps.values()) if verify else self._dirty_bytes(cursor)
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
                self._reached = volume, block + count
                yield volume, start, min(start + count * bitmap.block_bytes, bitmap.size_bytes)

    def _dirty_bytes(self, cursor: tuple[int, int]) -> int:
        total = 0
        for volume, bitmap in self._bitmaps.items():
            if volume > cursor[0]:
                total += bitmap.dirty_bytes
            elif volume == cursor[0]:
                done = int.from_bytes(bitmap.bits, "little") & (1 << cursor[1]) - 1
                total += max(0, bitmap.dirty_bytes - done.bit_count() * bitmap.block_bytes)
        return total

    def next_copy(self, now_s: float) -> Range | None:
        """A range to be copied now; it is under way until `acknowledged`."""
        if len(self._flying) >= WINDOW_CHUNKS or not self._may(now_s):
            return None
        found = self._found.popleft() if self._found else (None if self.compares else self._next())
        if found is None:
            return None
        self._flying[found[:2]] = found[2]
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
        """A range to be compared now; it is under way until `compared`."""
        if not self.compares or len(self._digests) >= DIGEST_WINDOW or len(self._found) >= WINDOW_CHUNKS:
            return None
        if not self._may(now_s):
            return None
        found = self._again.popleft() if self._again else self._next()
        if found is not None:
            self._digests[found[:2]] = found[2]
            self._budget_bytes -= found[2] - found[1]
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
        end = self._digests.pop((volume, start), None)
        self._journaled_s.pop((volume, start), None)
        if end is None:
            return False
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
        end = self._flying.pop((volume, start), None)
        if end is not None:
            self.copied_bytes += end - start

    def asked(self, volume: int, start: int, now_s: float) -> None:
        """A digest record is durable in the journal: the secondary's answer is due."""
        if (volume, start) in self._digests:
            self._journaled_s[volume, start] = now_s

    def ask_again(self, now_s: float) -> None:
        """Answers travel on links, and are lost with them: what was journaled long ago is compared once more."""
        for key in [key for key, since_s in self._journaled_s.items() if now_s - since_s > ANSWER_S]:
            del self._journaled_s[key]
            self._again.append((*key, self._digests.pop(key)))

    def interrupted(self, copies: set[Key], digests: set[Key]) -> None:
        """The link broke. What is in ``copies`` and ``digests`` will be sent again; the rest starts anew."""
        self._found.extendleft(
            (*key, self._flying.pop(key)) for key in sorted(self._flying.keys() - copies, reverse=True)
        )
        self._metadata = sorted({*self._metadata, *self._metadata_flying})
        self._metadata_flying.clear()
        for key in sorted(self._digests.keys() - digests):
            self._journaled_s.pop(key, None)
            self._again.append((*key, self._digests.pop(key)))

    @property
    def cursor(self) -> tuple[int, int]:
        """(volume, block) to go on from after a restart; what compares begins anew."""
        if self.compares:
            return 0, 0
        open_ranges = [*self._flying, *(each[:2] for each in self._found)]
        if not open_ranges:
            return self._reached
        volume, start = min(open_ranges)
        return volume, start // self._bitmaps[volume].block_bytes

    @property
    def done(self) -> bool:
        """Everything is copied, and acknowledged."""
        metadata = self._metadata or self._metadata_flying
        return self._exhausted and not (self._flying or self._found or self._digests or self._again or metadata)
