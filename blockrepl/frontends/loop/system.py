"""The system calls that Python has no name for: mount, umount2, prctl. All raise OSError with the path concerned."""

from __future__ import annotations

import ctypes
import os

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 2, 4, 8, 1024  # linux/include/uapi/linux/mount.h
MNT_DETACH = 2  # umount2(2)
PR_SET_IO_FLUSHER, PR_GET_IO_FLUSHER = 57, 58  # linux/include/uapi/linux/prctl.h, since 5.6
AT_FDCWD, AT_STATX_FORCE_SYNC = -100, 0x2000  # linux/include/uapi/linux/fcntl.h
STATX_SIZE, STATX_BYTES = 0x200, 256  # linux/include/uapi/linux/stat.h
FILESYSTEM = "fuse.blockrepl"  # type in the mount table: how leftovers are recognised

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


def _check(result: int, path: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def mount_fuse(source: str, path: str, device_fd: int, root_mode: int) -> None:
    """Mount the connection behind ``device_fd`` over ``path``. Does not wait for the server."""
    options = f"fd={device_fd},rootmode={root_mode:o},user_id={os.getuid()},group_id={os.getgid()}"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME
    _check(_libc.mount(source.encode(), os.fsencode(path), FILESYSTEM.encode(), flags, options.encode()), path)


def unmount(path: str, *, lazily: bool) -> None:
    """Unmount; ``lazily``: take it out of the tree now, and end it with its last user."""
    _check(_libc.umount2(os.fsencode(path), MNT_DETACH if lazily else 0), path)


def refresh_size(path: str) -> None:
    """Have the kernel ask the file system for the attributes of a file anew. Waits for its server."""
    found = ctypes.create_string_buffer(STATX_BYTES)
    _check(_libc.statx(AT_FDCWD, os.fsencode(path), AT_STATX_FORCE_SYNC, STATX_SIZE, found), path)


def mark_io_flusher() -> OSError | None:
    """Mark the calling thread, and the threads that it starts later, as one that the kernel's writeback depends on.

    Memory that such a thread allocates is never waited for by writing to the very device it serves. Needs
    CAP_SYS_RESOURCE; without it the error is returned, and the server works, but for a machine short of memory.
    """
    try:
        _check(_libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0), "PR_SET_IO_FLUSHER")
    except OSError as error:
        return error
    return None


def is_io_flusher() -> bool:
    """Whether the calling thread is marked."""
    return bool(_libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1)
