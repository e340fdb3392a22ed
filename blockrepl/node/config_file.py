"""What a node runs by: the file `config` in its directory. It wins over the definition until an adjust has changed it.

A configuration is *prepared* (the node has files for it; no host knows) before it *takes effect* (its record's number
was reached). Both are one durable write of this file, whole or not at all.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec
from crc32c import crc32c

from blockrepl.definition import Configuration, Definition, Node, configuration_from, configuration_of
from blockrepl.errors import DamagedError, StorageError
from blockrepl.storage.files import storage_error
from blockrepl.storage.image import write_durably

CONFIG_NAME = "config"
VERSION = 1


class ConfigFile:
    """An open one. ``number``: of the record by which the configuration took effect; 0: the group was made with it."""

    def __init__(
        self, path: Path, effective: Configuration, journal: Path, number: int = 0,
        prepared: Configuration | None = None, old_journal: Path | None = None,
    ) -> None:  # fmt: skip
        """``journal``: where the node's journal lies; ``old_journal``: where it lay, when that is to be removed."""
        self.path = path
        self.effective = effective
        self.number = number
        self.prepared = prepared
        self.journal = journal
        self._old_journal = old_journal

    @classmethod
    def create(cls, definition: Definition, node: Node) -> Path:
        """Make it, as the definition says. Raises StorageError."""
        file = cls(node.directory / CONFIG_NAME, configuration_of(definition), node.journal_path)
        file._store()
        return file.path

    @classmethod
    def open(cls, definition: Definition, node: Node) -> ConfigFile:
        """A node without one runs as its definition says. Raises DamagedError, StorageError."""
        path = node.directory / CONFIG_NAME
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return cls(path, configuration_of(definition), node.journal_path)
        except OSError as error:
            raise storage_error(f"cannot read {path}", error) from error
        stored = _parse(path, raw)
        prepared = stored["prepared"]
        old = stored["old_journal"]
        return cls(
            path, configuration_from(stored["effective"]), Path(stored["journal"]), int(stored["number"]),
            None if prepared is None else configuration_from(prepared), None if old is None else Path(old),
        )  # fmt: skip

    @property
    def held(self) -> Configuration:
        """The newest that the node has files for, or is about to make them."""
        return self.prepared or self.effective

    def prepare(self, configuration: Configuration) -> None:
        """Its files are made next; a restart in between makes them too. Raises StorageError."""
        same = configuration.digest == self.effective.digest
        self.prepared = None if same else configuration
        self._store()

    def take(self, digest: int, number: int) -> bool:
        """The configuration with this digest is in effect from ``number`` on. False: it is so already, or unknown here.

        Raises StorageError.
        """
        if self.prepared is None or digest != self.prepared.digest:
            return False
        self.effective, self.number, self.prepared = self.prepared, number, None
        self._store()
        return True

    def move_journal(self, path: Path, old: Path) -> None:
        """The journal is at ``path`` now. Raises StorageError: then it is where it was."""
        self.journal, self._old_journal = path, old
        try:
            self._store()
        except StorageError:
            self.journal, self._old_journal = old, None
            raise

    def drop_old_journal(self) -> None:
        """Remove what the journal was before it was moved. What cannot be removed now is at the next start."""
        if self._old_journal is not None and self._old_journal != self.journal:
            with contextlib.suppress(OSError, StorageError):
                self._old_journal.unlink(missing_ok=True)
                self._old_journal = None
                self._store()

    def _store(self) -> None:
        body = {
            "version": VERSION, "number": self.number, "effective": self.effective, "prepared": self.prepared,
            "journal": str(self.journal), "old_journal": str(self._old_journal) if self._old_journal else None,
        }  # fmt: skip
        raw = msgspec.json.encode(body)
        try:
            write_durably(self.path, raw + b"\n%08x\n" % crc32c(raw))
        except OSError as error:
            raise storage_error(f"cannot write {self.path}", error) from error


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    body, _, rest = raw.partition(b"\n")
    if rest.strip() != b"%08x" % crc32c(body):
        raise DamagedError(
            f"{path}: is damaged (checksum)",
            hint="take it from another node of the group: it is the same there, once adjust has ended",
        )
    stored: dict[str, Any] = msgspec.json.decode(body)
    if stored.get("version") != VERSION:
        raise DamagedError(f"{path}: version {stored.get('version')}, this program knows {VERSION}")
    return stored


def journal_path(definition: Definition, node: Node) -> Path:
    """Where a node's journal lies, whether it runs or not. Raises DamagedError, StorageError."""
    return ConfigFile.open(definition, node).journal
