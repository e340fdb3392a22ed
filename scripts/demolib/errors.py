"""What ends a demo early."""

from __future__ import annotations


class DemoError(Exception):
    """The story cannot go on; the message says why and what to do. ``exit_code`` as docs/command-line.md has it."""

    def __init__(self, message: str, exit_code: int = 10) -> None:
        super().__init__(message)
        self.exit_code = exit_code
