"""Image files: raw, sparse, without header; a sidecar file says whose they are.

Made by `ImageFile.create` and by nothing else: `ImageFile.open` on a missing image stops, because a missing image is
most often a disk that is not mounted. Writes go to the page cache, at 1.3 µs each, and so may run on the event loop;
`fdatasync` and `read` block and belong in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import construct
import crc32c

from blockrepl.block import MAX_METADATA_BYTES, Op, WriteBatch, WriteFlag
from blockrepl.errors import (
    BlockError,
    DamagedError,
    IdentityError,
    InUseError,
    MissingError,
    NoSpaceError,
    StorageError,
    UsageError,
)
from blockrepl.formats import image as layout
from blockrepl.formats.image import Side

_NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_UNSUPPORTED = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL))
_ZEROES = bytes(1 << 20)

# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """Whose bytes an image holds. Sizes in bytes."""

    group: UUID
    volume_id: int
    node_id: int
    side: Side
    size_bytes: int
    block_size_bytes: int

    def __post_init__(self) -> None:
        assert self.size_bytes > 0
        assert self.size_bytes % self.block_size_bytes == 0

    def pack(self) -> bytes:
        fields = {
            "side": self.side,
            "volume_id": self.volume_id,
            "node_id": self.node_id,
            "block_size_bytes": self.block_size_bytes,
            "group_id": self.group.bytes,
            "size_bytes": self.size_bytes,
            "crc": 0,
        }
        body: bytes = layout.image_identity.build(fields)[: -layout.CRC_BYTES]
        return body + crc32c.crc32c(body).to_bytes(layout.CRC_BYTES, "big")

    @classmethod
    def unpack(cls, data: bytes, where: str) -> ImageIdentity:
        """Raises DamagedError, naming ``where``."""
        try:
            fields = layout.image_identity.parse(data)
        except construct.ConstructError as error:
            raise DamagedError(f"{where}: not an image identity of version {layout.VERSION}") from error
        if len(data) != layout.IDENTITY_BYTES or crc32c.crc32c(data[: -layout.CRC_BYTES]) != fields.crc:
            raise DamagedError(f"{where}: the image identity is damaged (checksum)")
        return cls(
            UUID(bytes=fields.group_id),
            fields.volume_id,
            fields.node_id,
            Side(fields.side),
            fields.size_bytes,
            fields.block_size_bytes,
        )

    def difference(self, found: ImageIdentity) -> str:
        """The first thing in which ``found`` differs, in words; empty when nothing does."""
        for what, ours, theirs in (
            ("group", self.group, found.group),
            ("volume", self.volume_id, found.volume_id),
            ("node", self.node_id, found.node_id),
            ("side", self.side.name.lower(), found.side.name.lower()),
            ("size", self.size_bytes, found.size_bytes),
            ("block size", self.block_size_bytes, found.block_size_bytes),
        ):
            if ours != theirs:
                return f"{what} is {theirs}, not {ours}"
        return ""


def identity_path(path: Path) -> Path:
    """Where the identity of the image at ``path`` lies."""
    return path.with_name(path.name + ".id")


def metadata_path(path: Path) -> Path:
    """Where the metadata of the volume in the image at ``path`` lies."""
    return path.with_name(path.name + ".meta")


class ImageFile:
    """One open, locked image. Offsets and lengths in bytes, inside the image."""

    def __init__(self, fd: int, path: Path, identity: ImageIdentity, *, read_only: bool) -> None:
        self.fd = fd
        self.path = path
        self.identity = identity
        self.size_bytes = identity.size_bytes  # of the volume; the file may be prepared for a larger one (`grow`)
        self.read_only = read_only
        self._has_nowait = True

    # life

    @staticmethod
    def create(path: Path, identity: ImageIdentity, *, adopt: bool = False) -> bool:
        """Make an empty image and its identity, durably. False: it was there already, the same.

        With ``adopt`` a file that holds data is taken as it is; its size must be the volume's.

        Raises UsageError (data without identity), IdentityError, NoSpaceError, StorageError (the directory is missing
        or read-only). What it raises leaves nothing of its own behind.
        """
        with _translated(path):
            if identity_path(path).exists():
                ImageFile.open(path, identity, read_only=True).close()
                return False
            made = not path.exists()
            if not made:
                _refuse_data(path, identity, adopt=adopt)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    _lock(fd, path, fcntl.LOCK_EX)
                    os.ftruncate(fd, identity.size_bytes)
                    os.fsync(fd)
                    metadata_path(path).unlink(missing_ok=True)  # of an image that lay here once
                    write_durably(identity_path(path), identity.pack())
                finally:
                    os.close(fd)
            except BaseException as error:
                if made and not isinstance(error, InUseError):
                    with contextlib.suppress(OSError):
                        path.unlink()
                raise
            return True

    @classmethod
    def open(cls, path: Path, expected: ImageIdentity, *, read_only: bool = False) -> ImageFile:
        """Open and lock (writers alone, readers together). Raises MissingError, UsageError (data without identity),
        IdentityError, DamagedError, InUseError, StorageError."""
        with _translated(path):
            try:
                fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            except FileNotFoundError:
                raise MissingError(
                    f"{path}: the image is missing",
                    hint="is its disk mounted? `blockrepl create` makes a new, empty one",
                ) from None
            try:
                _lock(fd, path, fcntl.LOCK_SH if read_only else fcntl.LOCK_EX)
                try:
                    data = identity_path(path).read_bytes()
                except FileNotFoundError:
                    _refuse_data(path, expected)
                    raise MissingError(
                        f"{identity_path(path)}: the identity of the image is missing", hint="run `blockrepl create`"
                    ) from None
                found = ImageIdentity.unpack(data, str(identity_path(path)))
                difference = expected.difference(found)
                if difference:
                    raise IdentityError(f"{path}: not this volume's image: its {difference}")
                size = os.fstat(fd).st_size
                if size != expected.size_bytes:
                    raise IdentityError(f"{path}: the image has {size} bytes, not {expected.size_bytes}")
                return cls(fd, path, found, read_only=read_only)
            except BaseException:
                os.close(fd)
                raise

    @staticmethod
    def enlarge(path: Path, identity: ImageIdentity) -> None:
        """Finish a growth that a crash cut short; nothing when the image is as large already, or is missing.

        Raises DamagedError, NoSpaceError, StorageError. For the start, before `open`.
        """
        with _translated(path):
            if not (identity_path(path).exists() and path.exists()):
                return
            found = ImageIdentity.unpack(identity_path(path).read_bytes(), str(identity_path(path)))
            if found.size_bytes >= identity.size_bytes or identity.difference(
                replace(found, size_bytes=identity.size_bytes)
            ):
                return  # `open` says what is wrong
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                _lock(fd, path, fcntl.LOCK_EX)
                _extend(fd, path, identity)
            finally:
                os.close(fd)

    def grow(self, size_bytes: int) -> None:
        """Make room for a larger volume, durably; what is new reads as zeroes. `size_bytes` stays as it is.

        Short enough for the loop: nothing is allocated. Can be repeated. Raises NoSpaceError, StorageError.
        """
        if size_bytes > self.identity.size_bytes:
            identity = replace(self.identity, size_bytes=size_bytes)
            with _translated(self.path):
                _extend(self.fd, self.path, identity)
            self.identity = identity

    def close(self) -> None:
        """Unlock and close. Syncs nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # write

    def pwrite(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Write into the page cache. Raises OSError."""
        size = len(data)
        written = os.pwrite(self.fd, data, offset_bytes)
        if written != size:
            rest = memoryview(data)
            while written < size:
                written += os.pwrite(self.fd, rest[written:], offset_bytes + written)

    def store(self, batch: WriteBatch) -> None:
        """Perform a batch in order, into the page cache; sets ``batch.errors``. Syncs nothing.

        The hot loop: one system call per write, and nothing else that is not needed to know that it was well.
        """
        if batch.ops[0] == Op.METADATA:
            self._store_metadata(batch)
            return
        fd = self.fd
        pwrite = os.pwrite
        columns = zip(batch.offsets, batch.lengths, batch.payloads, strict=True)
        for index, (offset, length, payload) in enumerate(columns):
            try:
                if payload is None:
                    allocate = batch.ops[index] == Op.ZERO and batch.flags[index] & WriteFlag.NO_HOLE != 0
                    self.zero(offset, length, allocate=allocate)
                else:
                    written = pwrite(fd, payload, offset)
                    if written != length:
                        self.pwrite(offset + written, payload[written:])
            except OSError as error:
                if batch.errors is None:
                    batch.errors = [None] * len(batch.offsets)
                batch.errors[index] = block_error(error)

    def _store_metadata(self, batch: WriteBatch) -> None:
        assert len(batch) == 1
        payload = batch.payloads[0]
        assert payload is not None
        try:
            self.set_metadata(payload)
        except OSError as error:
            batch.errors = [block_error(error)]

    def set_metadata(self, data: bytes | memoryview) -> None:
        """Replace what front ends keep with the volume: durably, whole or not at all. Blocks. Raises OSError."""
        assert len(data) <= MAX_METADATA_BYTES
        write_durably(metadata_path(self.path), data)

    def metadata(self) -> bytes:
        """What `set_metadata` stored last; b"" for nothing. Raises OSError."""
        try:
            return metadata_path(self.path).read_bytes()
        except FileNotFoundError:
            return b""

    def zero(self, offset_bytes: int, length_bytes: int, *, allocate: bool) -> None:
        """Make the range read as zeroes: allocated, or else as a hole. Raises OSError.

        Falls back to writing zeroes where the file system cannot. May block for long on a large range.
        """
        mode = _ZERO_RANGE if allocate else _PUNCH_HOLE
        while _libc.fallocate(self.fd, mode | _KEEP_SIZE, offset_bytes, length_bytes) != 0:
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                self._write_zeroes(offset_bytes, length_bytes)
                return
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), str(self.path))

    def trim(self, offset_bytes: int, length_bytes: int) -> None:
        """Make the range read as zeroes, and give its space back. Raises OSError."""
        self.zero(offset_bytes, length_bytes, allocate=False)

    def _write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        end = offset_bytes + length_bytes
        view = memoryview(_ZEROES)
        while offset_bytes < end:
            size = min(len(view), end - offset_bytes)
            self.pwrite(offset_bytes, view[:size])
            offset_bytes += size

    def fdatasync(self) -> None:
        """Make everything written durable. Blocks. Raises OSError."""
        os.fdatasync(self.fd)

    # read

    def read_cached(self, offset_bytes: int, view: memoryview) -> bool:
        """Fill ``view`` from the page cache, without waiting for the disk; False when it is not all there.

        Raises OSError.
        """
        if self._has_nowait:
            try:
                return os.preadv(self.fd, (view,), offset_bytes, os.RWF_NOWAIT) == len(view)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._has_nowait = False
        return False

    def read(self, offset_bytes: int, view: memoryview) -> None:
        """Fill ``view``. Blocks. Raises OSError."""
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, (view[done:],), offset_bytes + done)
            if count == 0:
                raise OSError(errno.EIO, "the image ends early", str(self.path))
            done += count

    def allocation(self, offset_bytes: int, length_bytes: int, limit: int = 4096) -> list[tuple[int, int, bool]]:
        """Extents (offset, length, is_data) that cover the range; beyond ``limit`` of them the rest is said to be data.

        Raises OSError.
        """
        extents: list[tuple[int, int, bool]] = []
        at, end = offset_bytes, offset_bytes + length_bytes
        while at < end and len(extents) + 2 < limit:
            try:
                data = min(os.lseek(self.fd, at, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end
            if data > at:
                extents.append((at, data - at, False))
            if data < end:
                hole = min(os.lseek(self.fd, data, os.SEEK_HOLE), end)
                extents.append((data, hole - data, True))
                data = hole
            at = data
        if at < end:
            extents.append((at, end - at, True))
        return extents


def block_error(error: OSError) -> BlockError:
    """What a host hears of an operating system's error: no space, or an I/O error."""
    code = errno.ENOSPC if error.errno in _NO_SPACE else errno.EIO
    return BlockError(code, str(error))


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn what the operating system says about ``path`` into our errors."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise NoSpaceError(f"{path}: no space for the image: {error.strerror}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"{path}: cannot be written here: {error.strerror}") from error
        if error.errno == errno.ENOENT:
            raise MissingError(f"{path}: its directory is missing", hint="is its disk mounted?") from error
        raise StorageError(f"{path}: {error.strerror}") from error


def _lock(fd: int, path: Path, how: int) -> None:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError(f"{path}: another process has this image open") from None


def _extend(fd: int, path: Path, identity: ImageIdentity) -> None:
    """The file first, then the identity: a crash in between leaves what `ImageFile.enlarge` finishes."""
    if os.fstat(fd).st_size < identity.size_bytes:
        os.ftruncate(fd, identity.size_bytes)
        os.fsync(fd)
    write_durably(identity_path(path), identity.pack())


def _refuse_data(path: Path, identity: ImageIdentity, *, adopt: bool = False) -> None:
    """An image without identity is taken only if it is empty, or adopted. Raises UsageError, IdentityError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: an image is a regular file, and this is not one")
    if status.st_size == 0:
        return
    if not adopt and holds_data(path):
        raise UsageError(
            f"{path}: holds data already",
            hint="to make it the P-VOL as it is: `blockrepl create --adopt`, then `blockrepl pair create`; "
            "else move it away first",
        )
    if status.st_size != identity.size_bytes:
        raise IdentityError(
            f"{path}: the image has {status.st_size} bytes, not {identity.size_bytes}",
            hint=f'write size = "{status.st_size}" in the definition, or make the file as large as that says',
        )


def holds_data(path: Path) -> bool:
    """Whether anything was ever written to a file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    finally:
        os.close(fd)
    return True


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Put a small file in place whole or not at all, durably. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            written = os.write(fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, "short write", str(temporary))
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
