"""Moves the journal of a running node: to another file, or to another size (`blockrepl adjust`).

Hosts wait only while what the ring holds is copied: nothing is appended then. The new file becomes the journal by one
durable write: the rename over the old one, or, at another path, the note in `config` that says where it lies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from blockrepl.errors import StorageError, UsageError
from blockrepl.formats.journal import frame_bytes
from blockrepl.node.config_file import ConfigFile
from blockrepl.storage.files import storage_error
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.journal_move import NewJournal, refuse_stranger
from blockrepl.storage.slots import Identity

QUIET_POLL_S = 0.002


def check_size(ring_bytes: int, max_write_bytes: int) -> None:
    """Whether writes as large as hosts have been allowed find room in a ring. Raises UsageError."""
    least = 4 * frame_bytes(max_write_bytes + 4096)  # a frame, the PAD before it, and as much for the other primaries
    if ring_bytes < least:
        raise UsageError(
            f"a ring of {ring_bytes} bytes is too small for writes of {max_write_bytes} bytes: hosts may send such now",
            hint=f"choose at least {least} bytes; for less, adjust in steps and restart the primaries in between",
        )


async def move_journal(
    journal: JournalFile,
    identity: Identity,
    path: Path,
    ring_bytes: int,
    config: ConfigFile,
    state: Callable[[], bytes],
) -> None:
    """Returns when the new one is the journal. Raises UsageError, StorageError: then the old one still is."""
    refuse_stranger(path, journal.path, identity)
    new = await asyncio.to_thread(NewJournal, path, identity, ring_bytes)
    try:
        journal.hold()
        while not journal.quiet:
            await asyncio.sleep(QUIET_POLL_S)
            journal.press()
        answered = asyncio.Event()
        journal.last_words(answered.set)
        await answered.wait()
        frames = list(journal.journal.frames())
        await asyncio.to_thread(new.copy, frames, journal.reader(), state())
        try:
            new.save(state())  # of this very moment; from here on nothing else happens until it is the journal
        except OSError as error:
            raise storage_error(f"cannot write {new.draft}", error) from error
        _commit(journal, new, config)
    except BaseException:
        new.abandon()
        journal.release()
        raise
    journal.release()
    config.drop_old_journal()


def _commit(journal: JournalFile, new: NewJournal, config: ConfigFile) -> None:
    old = journal.path
    try:
        new.name()
        if new.path != old:
            config.move_journal(new.path, old)
    except StorageError as error:
        journal.stop(error)  # which of the two a restart would find is not known: nothing more goes into this one
        raise
    journal.adopt(new.fd, new.journal, new.path, new.position_of)
