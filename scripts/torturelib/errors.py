"""What ends a torture early, and what it is there to find."""

from __future__ import annotations


class TortureError(Exception):
    """It cannot go on; the message says why. ``exit_code`` as docs/torture.md has it."""

    def __init__(self, message: str, exit_code: int = 10) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class BrokenPromiseError(Exception):
    """A round found what must not be; the message says what."""
