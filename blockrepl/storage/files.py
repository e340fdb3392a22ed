"""Making, locking and reading the files of a node. Blocking calls: for the start, not for the data path."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from blockrepl.errors import DamagedError, InUseError, MissingError, NoSpaceError, StorageError, UsageError

ZEROS = bytes(1 << 20)


def create_file(path: Path, fill: Callable[[int], None]) -> None:
    """Make ``path`` from what ``fill(fd)`` writes: whole and durable, or not at all.

    Raises UsageError (it exists), NoSpaceError, StorageError.
    """
    if path.exists():
        raise UsageError(f"{path} exists already", hint="`blockrepl create` never overwrites; move it away first")
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fill(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(draft, path)
        sync_directory(path.parent)
    except FileExistsError as error:
        raise UsageError(
            f"{path} is being made by another process", hint="wait for it, or remove what it left"
        ) from error
    except OSError as error:
        raise storage_error(f"cannot make {path}", error) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def open_locked(path: Path) -> int:
    """Open for reading and writing, for this process alone. Raises MissingError, InUseError, StorageError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MissingError(
            f"{path} is not there", hint="is its disk mounted? `blockrepl create` makes it, once; `serve` never does"
        ) from error
    except OSError as error:
        raise storage_error(f"cannot open {path}", error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise InUseError(f"{path} is in use by another process", hint="`blockrepl ls` shows running nodes") from error
    return fd


def fill_zeros(fd: int, size_bytes: int) -> None:
    """Allocate and write: on an extent that was never written a sync takes twice as long. Raises OSError."""
    os.posix_fallocate(fd, 0, size_bytes)
    for offset in range(0, size_bytes, len(ZEROS)):
        write_at(fd, offset, memoryview(ZEROS)[: size_bytes - offset])


def write_at(fd: int, offset: int, data: bytes | memoryview) -> None:
    """``pwrite`` until everything is written. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


def read_at(fd: int, offset: int, length: int) -> bytes:
    """Exactly ``length`` bytes. Raises DamagedError when the file ends before, StorageError."""
    pieces = []
    while length:
        try:
            piece = os.pread(fd, length, offset)
        except OSError as error:
            raise storage_error(f"cannot read at {offset}", error) from error
        if not piece:
            raise DamagedError(
                f"the file ends at {offset}, {length} bytes early", hint="was it truncated or copied in part?"
            )
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def sync_directory(path: Path) -> None:
    """Make names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def storage_error(what: str, error: OSError) -> StorageError:
    """The operating system's error as ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpaceError(f"{what}: {error.strerror}", hint="free some space and try again")
    return StorageError(f"{what}: {error.strerror or error}")
