"""The Debian packages that the lab's guest is made of: downloaded by apt and unpacked, not installed.

.lab/debs/*.deb     .lab/unpacked/PACKAGE/     .lab/guest.cpio, .lab/vmlinuz (made by `initramfs`)
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

LAB = Path(__file__).resolve().parents[2] / ".lab"
KERNEL = "linux-image-cloud-amd64"  # a package that names the newest one
PACKAGES = (
    "busybox-static", "open-iscsi", "libopeniscsiusr", "libisns0", "nbd-client", "libnl-3-200", "libnl-genl-3-200",
    "libgnutls30", "e2fsprogs",
)  # fmt: skip
_TIMEOUT_S = 300.0


class LabUnavailableError(Exception):
    """The lab cannot be used here; the message says why."""


def reason_against() -> str | None:
    """Why the guest cannot run on this machine, whatever is downloaded; None if it can."""
    if platform.machine() != "x86_64":
        return f"the guest is x86-64, this machine is {platform.machine()}"
    if shutil.which("qemu-system-x86_64") is None:
        return "qemu-system-x86_64 is not installed (scripts/setup --debian)"
    return None


def kernel_package() -> str:
    """The package of the newest cloud kernel, by name. Raises LabUnavailableError."""
    match = re.search(r"Depends: (linux-image-\S+)", _run("apt-cache", "depends", KERNEL))
    if match is None:
        raise LabUnavailableError(f"apt knows no {KERNEL}")
    return match[1]


def fetch() -> None:
    """Download and unpack what is missing. Raises LabUnavailableError without apt or network."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise LabUnavailableError(f"{tool} is not here: the guest is made of Debian packages")
    debs = LAB / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    if not list((LAB / "unpacked").glob("linux-image-*")):
        _fetch(debs, kernel_package())
    for package in PACKAGES:
        _fetch(debs, package)


def _fetch(debs: Path, package: str) -> None:
    target = LAB / "unpacked" / package
    if target.is_dir():
        return
    if not list(debs.glob(f"{package}_*.deb")):
        _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, where=debs)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _run("dpkg-deb", "--extract", str(next(debs.glob(f"{package}_*.deb"))), str(partial))
    partial.rename(target)


def _run(*argv: str, where: Path | None = None) -> str:
    try:
        done = subprocess.run(
            argv, cwd=where, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
            env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabUnavailableError(f"{argv[0]}: {error}") from error
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it says nothing"]
        raise LabUnavailableError(f"{' '.join(argv[:6])} ended with {done.returncode}: {words[-1]}")
    return done.stdout
