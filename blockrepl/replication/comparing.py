"""Volumes mode: what the intermediate's own volumes say of a digest record, joined with what the secondary says.

Every digest record that is durable is compared here too. The primary gets one answer with both: what differs at the
secondary is copied to it, and so to the intermediate as well; what differs only here is copied in records whose stream
is the intermediate itself. So only digests cross hop 2 while intermediate volumes are filled.
"""

from __future__ import annotations

from typing import Any

REMEMBERED = 256  # digest records whose secondary has not answered; one that is forgotten counts as unknown


def block_bytes(fields: dict[str, Any]) -> int:
    """Of the blocks that a DIGESTED speaks of: a power of two; the last one may be short."""
    longest = -(-fields["length_bytes"] // fields["blocks"])
    return 1 << int(longest - 1).bit_length()


class Comparing:
    """The digest records under way. Performs no I/O.

    Invariant: a block is left out of an answer's "here" only if it was compared here, or goes to the secondary.
    """

    def __init__(self, *, local: bool) -> None:
        """``local``: there are intermediate volumes; else answers are passed on as they come."""
        self._local = local
        self._found: dict[int, list[int] | None] = {}  # number → offsets that differ; None while it is compared
        self._waiting: dict[int, dict[str, Any]] = {}  # number → the secondary's answer

    def asked(self, number: int) -> None:
        """A digest record is durable, and is being compared; `compared` follows."""
        self._found[number] = None
        if len(self._found) > REMEMBERED:
            oldest = min(self._found)
            del self._found[oldest]

    def compared(self, number: int, different: list[int] | None) -> dict[str, Any] | None:
        """These blocks differ here, None for unknown; returns the answer for the primary, when it is complete."""
        fields = self._waiting.pop(number, None)
        if fields is not None:
            self._found.pop(number, None)
            return self._joined(fields, different)
        if number in self._found:
            if different is None:
                del self._found[number]
            else:
                self._found[number] = different
        return None

    def answered(self, fields: dict[str, Any]) -> dict[str, Any] | None:
        """DIGESTED of a secondary; returns the answer for the primary, when it is complete."""
        number = fields["number"]
        if not self._local or not fields["blocks"]:
            return fields
        if number not in self._found:  # numbered by an older process: nobody knows
            return self._joined(fields, None)
        different = self._found[number]
        if different is None:
            self._waiting[number] = fields
            return None
        del self._found[number]
        return self._joined(fields, different)

    @staticmethod
    def _joined(fields: dict[str, Any], different: list[int] | None) -> dict[str, Any]:
        there = set(fields["different"])
        if different is None:
            start, length = fields["offset_bytes"], fields["length_bytes"]
            different = list(range(start, start + length, block_bytes(fields)))
        return {**fields, "here": [offset for offset in different if offset not in there]}
