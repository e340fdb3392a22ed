"""The exception tree. Every class carries the exit code that the command line ends with.

Errors are ours (a wrong call: plain ``AssertionError``), the operator's (`UsageError` and below), the peer's
(`ProtocolError` and below), the disk's (`StorageError` and below) or the host's (`BlockError`, which a front end
turns into its own code).
"""

from __future__ import annotations

import errno


class BlockreplError(Exception):
    """Base of all errors. ``hint`` says what to do next."""

    exit_code = 10

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(BlockreplError):
    """The command does not fit the state or the arguments."""

    exit_code = 2


class DefinitionError(BlockreplError):
    """A definition file is wrong. ``where`` is like ``targets/demo.toml: $.volume[1].size``."""

    exit_code = 3

    def __init__(self, where: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{where}: {message}", hint=hint)
        self.where = where


class NotRunningError(BlockreplError):
    """A node does not answer on its control socket."""

    exit_code = 4


class EnvironmentLacksError(BlockreplError):
    """This machine lacks something (a device, a privilege, a program)."""

    exit_code = 5


class TimeoutExpiredError(BlockreplError):
    """What was waited for did not happen in time."""

    exit_code = 6


class StorageError(BlockreplError):
    """A disk, or what lies on it."""

    exit_code = 20


class MissingError(StorageError):
    """A journal, image or identity that `create` should have made is not there."""

    exit_code = 21


class IdentityError(StorageError):
    """A journal or image that belongs to another group, node or volume, or has another size."""

    exit_code = 22


class InUseError(StorageError):
    """Another process holds the lock."""

    exit_code = 23


class DamagedError(StorageError):
    """Bytes that were durable are not what was written. Never repaired by guessing."""

    exit_code = 24


class NoSpaceError(StorageError):
    """The disk or the ring is full."""

    exit_code = 25


class ProtocolError(BlockreplError):
    """The peer said what the protocol does not allow. The link closes; nothing else is touched."""

    exit_code = 30


class SequenceGapError(ProtocolError):
    """A batch or record is not the successor of the last one received."""

    exit_code = 31


class RefusedError(ProtocolError):
    """The peer refused us, and says why."""

    exit_code = 32


class EpochError(ProtocolError):
    """A higher epoch exists: this side no longer has a say."""

    exit_code = 33


class SplitBrainError(EpochError):
    """Two stored epochs with one number and different ids."""

    exit_code = 34


class BlockError(BlockreplError):
    """A host's command failed. ``errno_code`` is a Linux errno; each front end has one table from it."""

    exit_code = 40

    def __init__(self, errno_code: int, message: str = "") -> None:
        super().__init__(message or errno.errorcode.get(errno_code, str(errno_code)))
        self.errno_code = errno_code
