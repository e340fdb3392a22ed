"""A place for loop devices that is clean afterwards, whatever a test did."""

import contextlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockrepl.frontends.loop import device, system
from blockrepl.frontends.loop.frontend import capabilities
from blockrepl.frontends.loop.leftovers import clean_leftovers


def reason_to_skip() -> str:
    lacking = [
        f"{name}: {entry['why']}" for name, entry in capabilities().items() if entry["needed"] and not entry["ok"]
    ]
    return "; ".join(lacking)


def need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; when the test ends, nothing in the system may point into it."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    directory = tmp_path / f"run-{uuid.uuid4().hex[:8]}"
    directory.mkdir()
    yield directory
    left = remains(directory)
    for _, target, _ in reversed(list(device.mounts())):
        if target.startswith(str(tmp_path)) and not target.startswith(str(directory)):
            subprocess.run(["umount", "-l", target], check=False)
    clean_leftovers(directory)
    for _, target, _ in list(device.mounts()):
        if target.startswith(str(directory)):
            with contextlib.suppress(OSError):
                system.unmount(target, lazily=True)
    assert not left, "the test left something behind (cleaned now)"


def remains(directory: Path) -> list[str]:
    devices = [
        f"{name} over {backing}" for name, backing in device.bound_devices() if backing.startswith(str(directory))
    ]
    return devices + [target for _, target, _ in device.mounts() if target.startswith(str(directory))]
