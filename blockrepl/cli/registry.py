"""Which groups run on this machine, and where their definitions lie: one small file per group.

Written by `up` and `serve`, so that ``attach demo/data`` finds the definition of ``demo``. It is a convenience, never
the truth: a group is running when its nodes answer. The files lie in /run/blockrepl (root), $XDG_RUNTIME_DIR/blockrepl,
or where BLOCKREPL_RUNTIME_DIR says.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import msgspec

from blockrepl.definition import Definition

SUFFIX = ".json"
SYSTEM_FOLDER = Path("/run/blockrepl")


def register(definition: Definition) -> None:
    """Note where the group's definition lies. A machine that has no place for it only loses the convenience."""
    folder = _own_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700 if _shared(folder) else 0o755, parents=True, exist_ok=True)
        if _trusted(folder):
            fresh = folder / f".{definition.name}.{os.getpid()}"
            fresh.write_bytes(msgspec.json.encode({"definition": str(definition.path)}))
            fresh.replace(folder / f"{definition.name}{SUFFIX}")


def forget(group: str) -> None:
    """Remove the note."""
    with contextlib.suppress(OSError):
        (_own_folder() / f"{group}{SUFFIX}").unlink()


def groups() -> dict[str, Path]:
    """Group name → definition, of the files that are still there; own notes before the system's."""
    found: dict[str, Path] = {}
    for folder in _folders():
        if not _trusted(folder):
            continue
        for note in sorted(folder.glob(f"*{SUFFIX}")):
            with contextlib.suppress(OSError, msgspec.DecodeError, KeyError, TypeError):
                path = Path(msgspec.json.decode(note.read_bytes())["definition"])
                if path.is_file():
                    found[note.stem] = path
    return found


def _folders() -> list[Path]:
    """To read; later ones win."""
    own = _own_folder()
    return [own] if "BLOCKREPL_RUNTIME_DIR" in os.environ else list(dict.fromkeys((SYSTEM_FOLDER, own)))


def _own_folder() -> Path:
    """To write."""
    if chosen := os.environ.get("BLOCKREPL_RUNTIME_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return SYSTEM_FOLDER
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "blockrepl" if runtime else Path(f"/tmp/blockrepl-{os.geteuid()}")


def _shared(folder: Path) -> bool:
    return folder.parent == Path("/tmp")


def _trusted(folder: Path) -> bool:
    """In /tmp anybody may have made our folder: then it is not read."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid in (0, os.geteuid())
