"""One batch of a host, as the simulator remembers it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Write:
    """One batch of a host."""

    volume: int
    ops: list[int]
    offsets: list[int]
    lengths: list[int]
    payloads: list[bytes]
    after: int  # every write with this number or a lower one that completed had completed before
    fua: bool = False
    number: int = 0  # the last of its numbers, once given
    solo: bool = False  # its primary took it alone
    alone: int = 0  # it was submitted after writes had been completed alone: which time; see `pairs.PairTruth`
