"""A running guest: boot it, give it commands, end it."""

from __future__ import annotations

import base64
import os
import select
import socket
import subprocess
import time
from pathlib import Path

from tests.lab.packages import LabUnavailableError
from tests.patience import patient

HOST = "10.0.2.2"  # the machine's loopback, seen from the guest
BOOT_TIMEOUT_S = patient(300.0)  # software emulation on a busy machine
COMMAND_TIMEOUT_S = patient(180.0)
_MEMORY_MIB, _CPUS = 512, 2


class GuestError(AssertionError):
    """A command of the guest failed, or the guest is gone. The message has what it said."""


class Guest:
    """Use as a context: QEMU ends with it. Emulation in software, so that no privilege is needed."""

    def __init__(self, kernel: Path, root: Path, folder: Path) -> None:
        self._console = folder / "console.log"
        self._line, theirs = socket.socketpair()
        self._unread = b""
        # q35 and not microvm, which lacks a clock to calibrate the TSC with.
        argv = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-nodefaults"]
        argv += ["-no-user-config", "-display", "none", "-no-reboot", "-m", str(_MEMORY_MIB), "-smp", str(_CPUS)]
        argv += ["-kernel", str(kernel), "-initrd", str(root)]
        argv += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on"]
        argv += ["-serial", f"file:{self._console}"]
        argv += ["-chardev", f"socket,id=line,fd={theirs.fileno()}", "-serial", "chardev:line"]
        argv += ["-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,romfile=,netdev=net"]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(),), start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def __enter__(self) -> Guest:
        try:
            words = self._answer(BOOT_TIMEOUT_S).split()
        except BaseException:
            self.__exit__()
            raise
        assert words[0] == "ready"
        self.boot_s, self.kernel = float(words[1]), words[2]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._line.close()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def run(self, script: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a script of busybox sh; its output. Raises GuestError when it does not end with 0."""
        status, output = self.attempt(script, timeout_s=timeout_s)
        if status:
            raise GuestError(f"ended with {status}: {script}\n{output}\n{self.console()}")
        return output

    def attempt(self, script: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """Run a script; (exit status, output)."""
        self._line.sendall(base64.b64encode(script.encode()) + b"\n")
        status, _, output = self._answer(timeout_s).partition(" ")
        return int(status), base64.b64decode(output).decode(errors="replace")

    def console(self) -> str:
        """The end of what its kernel said."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return "\n".join(text.splitlines()[-20:])

    def _answer(self, timeout_s: float) -> str:
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._line], [], [], left_s)[0]:
                raise GuestError(f"no answer within {timeout_s:g} s\n{self.console()}")
            received = self._line.recv(1 << 16)
            if not received:
                raise self._gone()
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode().strip()

    def _gone(self) -> Exception:
        self._process.wait()
        assert self._process.stderr is not None
        words = os.read(self._process.stderr.fileno(), 4096).decode(errors="replace").strip()
        if words:
            return LabUnavailableError(f"QEMU: {words}")
        return GuestError(f"the guest ended\n{self.console()}")
