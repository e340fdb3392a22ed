"""Times and sizes that the roles go by; a definition's [policy] fills them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """See ARCHITECTURE.md, "Definition"."""

    heartbeat_s: float = 1.0
    link_timeout_s: float = 5.0
    hold_s: float = 30.0
    checkpoint_s: float = 5.0
    checkpoint_bytes: int = 64 << 20
    round_s: float = 0.01
    round_bytes: int = 8 << 20
    open_backoff_s: float = 5.0  # before the intermediate supersedes a promise that led nowhere
    window_bytes: int = 32 << 20  # credit that a sender may have unused, at most
    lease_s: float = 3.0  # fence never: how old an echo may be for the intermediate to number (rule 16)
    fence_never: bool = False
    suspend_when_full: bool = True  # on_full: hop 2 falls back to bitmaps; else the hosts are held back
    pending_bytes: int = 64 << 20  # writes that a primary holds before its front ends stop reading


MAX_OPEN_ROUNDS = 16  # prepare rounds that a secondary may leave unanswered
TRANSMIT_BYTES = 4 << 20  # one helping of a stream, at most
HELPING_BYTES = 256 << 10  # less than this waits for the next prepare round: nothing is gained by sending it sooner
