"""The archive that a kernel unpacks as its first root file system.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import stat
from io import BytesIO
from pathlib import Path

_ALIGN = 4


class Archive:
    """Built in memory: directories are made on the way, names are relative to the root."""

    def __init__(self) -> None:
        self._out = BytesIO()
        self._names: set[str] = set()

    def directory(self, name: str) -> None:
        if name in ("", ".") or name in self._names:
            return
        self.directory(str(Path(name).parent))
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """A second file of one name is left out."""
        if name not in self._names:
            self.directory(str(Path(name).parent))
            self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, name: str, target: str) -> None:
        self.directory(str(Path(name).parent))
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return self._out.getvalue()

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        self._names.add(name)
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        numbers = (len(self._names), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name.encode()) + 1, 0)
        self._write(b"070701" + b"".join(b"%08x" % number for number in numbers) + name.encode() + b"\0")
        self._write(content)

    def _write(self, part: bytes) -> None:
        self._out.write(part + bytes(-len(part) % _ALIGN))
