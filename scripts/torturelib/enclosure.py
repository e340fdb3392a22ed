"""Namespaces of our own: whatever a torture makes in them (links, mounts, processes) ends with it, kill -9 included.

We become two processes: one outside, which passes signals on and waits, and the torture inside, the first process of
its PID namespace.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

# linux/sched.h, linux/fs.h, linux/prctl.h
_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x20000000, 0x40000000
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def enter() -> str:
    """Go on inside. Returns why it cannot be, empty when it is; the outer process never returns."""
    if os.geteuid() != 0:
        return "this is not root"
    if _libc.unshare(_CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET) != 0:
        return f"no namespaces: {os.strerror(ctypes.get_errno())}"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        _wait_outside(child)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()  # Ctrl-C reaches the outer process only, which passes it on: once
    _mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE)
    _mount(b"proc", b"/proc", b"proc", 0)
    return ""


def leave_mounts() -> None:
    """A mount namespace of our own, for a process that serves what is mounted in the one it leaves.

    The last process of a mount namespace unmounts what is there before its own files are closed: one that serves the
    disk below would wait for itself. Raises OSError.
    """
    if _libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    _mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE)


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int) -> None:
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), None) != 0:
        raise OSError(ctypes.get_errno(), f"mount on {target.decode()}: {os.strerror(ctypes.get_errno())}")


def enter_network_namespace(fd: int) -> None:
    """This thread only; sockets stay where they were made. Raises OSError."""
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _wait_outside(child: int) -> None:
    def pass_on(number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in PASSED:
        signal.signal(number, pass_on)
    while True:
        with suppress(InterruptedError):
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
