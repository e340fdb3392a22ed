"""What this machine has: Python packages, kernel features, programs, room and ports for a definition."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from blockrepl.cli.client import is_running
from blockrepl.cli.output import bytes_text
from blockrepl.definition import Address, Definition, Node

PR_GET_IO_FLUSHER = 58  # linux/prctl.h, Linux 5.6
PACKAGES = ("construct", "pyroute2", "aiofiles", "uvloop", "crc32c", "msgspec", "typer", "rich")
PROGRAMS = (
    # program, Debian package, what it is for
    ("fio", "fio", "bench, demo"),
    ("mkfs.ext4", "e2fsprogs", "demo"),
    ("mkfs.xfs", "xfsprogs", "demo"),
    ("mkfs.btrfs", "btrfs-progs", "tests"),
    ("qemu-img", "qemu-utils", "tests"),
    ("qemu-io", "qemu-utils", "tests"),
    ("qemu-nbd", "qemu-utils", "bench, tests"),
    ("qemu-storage-daemon", "qemu-system-common", "bench"),
    ("nbdkit", "nbdkit", "bench"),
    ("nbdinfo", "libnbd-bin", "tests"),
    ("nbdcopy", "libnbd-bin", "tests"),
    ("fusermount3", "fuse3", "bench"),
    ("ip", "iproute2", "lab"),
)


class Check(msgspec.Struct, frozen=True):
    """One thing a machine has or lacks. ``required``: the main job cannot run without it."""

    name: str
    ok: bool
    found: str
    purpose: str
    remedy: str
    required: bool = False


def python_checks() -> list[Check]:
    """The interpreter and what setup.cfg names."""
    version = platform.python_version()
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    found = f"missing: {', '.join(missing)}" if missing else f"{len(PACKAGES)} packages"
    return [
        Check("python", sys.version_info >= (3, 11), version, "everything", "apt-get install python3", True),
        Check("python packages", not missing, found, "everything", "scripts/setup", True),
    ]


def kernel_checks() -> list[Check]:
    """What `attach`, the lab and kernel clients need."""
    root = os.geteuid() == 0
    return [
        Check("linux", sys.platform == "linux", platform.release(), "everything", "use Linux", True),
        Check("root", root, "root" if root else f"user {os.geteuid()}", "attach", "sudo"),
        _openable("loop devices", "/dev/loop-control", "attach", "as root: modprobe loop"),
        _openable("fuse", "/dev/fuse", "attach", "as root: modprobe fuse"),
        _io_flusher(),
        _namespaces(),
        _nbd_module(),
    ]


def _openable(name: str, device: str, purpose: str, remedy: str) -> Check:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return Check(name, False, f"{device}: permission denied", purpose, "run as root")
    except OSError as error:
        return Check(name, False, f"{device}: {error.strerror}", purpose, remedy)
    return Check(name, True, device, purpose, remedy)


def _io_flusher() -> Check:
    """Asks only: the answer needs the same privilege as the setting."""
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0)
    found = "allowed" if answer >= 0 else os.strerror(ctypes.get_errno())
    return Check("PR_SET_IO_FLUSHER", answer >= 0, found, "attach", "root (CAP_SYS_RESOURCE), Linux 5.6 or newer")


def _namespaces() -> Check:
    ok, found = _runs(["unshare", "--net", "true"])
    return Check("network namespaces", ok, "can be made" if ok else found, "lab", "run as root")


def _nbd_module() -> Check:
    there = Path("/sys/module/nbd").exists()
    remedy = "as root: modprobe nbd; kernels without it still serve and attach"
    return Check("kernel nbd client", there, "loaded" if there else "not loaded", "nbd-client", remedy)


def program_checks() -> list[Check]:
    """Other people's tools that tests, demo and bench use."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    checks = []
    for program, package, purpose in PROGRAMS:
        where = shutil.which(program, path=path)
        remedy = f"as root: apt-get install --no-install-recommends {package}"
        checks.append(Check(program, where is not None, where or "not found", purpose, remedy))
    if shutil.which("fio"):
        ok, _ = _runs(["fio", "--enghelp=nbd"])
        checks.append(
            Check("fio ioengine=nbd", ok, "built in" if ok else "not built in", "bench", "Debian's fio has it")
        )
    return checks


def _runs(command: list[str]) -> tuple[bool, str]:
    """(exit status is 0, last line of its stderr)."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
    return done.returncode == 0, lines[-1]


def definition_checks(definition: Definition) -> list[Check]:
    """Room and ports for this machine's nodes."""
    checks = []
    for node in definition.local_nodes():
        checks.append(_room(definition, node))
        if (node.directory / "loop").is_dir():
            checks.append(_leftovers(definition, node))
        if not is_running(node.directory):
            addresses = (node.listen, node.nbd, *(node.iscsi or ()))
            checks += [_port(node, address) for address in addresses if address is not None]
    return checks


def _leftovers(definition: Definition, node: Node) -> Check:
    """Loop devices and mounts whose server was killed: their users get EIO until they let go."""
    from blockrepl.frontends.loop.leftovers import find_leftovers

    found = [str(each) for each in find_leftovers(node.directory)]
    remedy = f"blockrepl doctor {definition.path} --clean, or blockrepl up"
    return Check(f"leftovers of {node.name}", not found, ", ".join(found) or "none", "attach", remedy)


def _room(definition: Definition, node: Node) -> Check:
    """Images are sparse: too little room is no obstacle yet, a directory that cannot be written is."""
    name, purpose = f"room for {node.name}", definition.name
    existing = next(path for path in (node.directory, *node.directory.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, False, f"{existing} cannot be written", purpose, "change its owner or mode", True)
    free = shutil.disk_usage(existing).free
    missing = _still_needed(definition, node)
    found = f"{bytes_text(free)} free, may still grow by {bytes_text(missing)}"
    return Check(name, free >= missing, found, purpose, f"make room on the file system of {existing}")


def _still_needed(definition: Definition, node: Node) -> int:
    volumes = {*definition.volumes_of_primary(node.name), *definition.volumes_of_secondary(node.name)}
    needed = sum(max(0, volume.size_bytes - _allocated(node.directory / f"{volume.name}.img")) for volume in volumes)
    journals = {"intermediate": definition.group.journal, "secondary": definition.group.secondary_journal}
    journal = int(journals.get(node.role, 0))
    return needed + max(0, journal - _allocated(node.journal_path))


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _port(node: Node, address: Address) -> Check:
    """Free, and an address of this machine."""
    remedy = "choose another in the definition, or stop what uses it (ss -ltnp)"
    try:
        family, _, _, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
    except OSError as error:
        return Check(f"port of {node.name}", False, f"{address}: {error.strerror}", node.role, remedy, True)
    return Check(f"port of {node.name}", True, f"{address} is free", node.role, remedy, True)
