"""A small database with a write-ahead log: accounts in pages on one volume, its log on a volume of another primary.

A transaction moves money between two accounts. It is committed when its log block is written durably; pages follow
whenever they like; a checkpoint makes the pages durable and then, in the header, lets the log be used anew. So an image
of both volumes can be recovered only if it keeps the order across them, both ways: a page must not be ahead of the log,
and the log must not be reused ahead of the header.
"""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from crc32c import crc32c

from tests.demo.nbd_client import NbdVolume

BLOCK_BYTES = 4096
PLACE_BYTES = 128 << 20  # where it lies on either volume
PAGES, SLOTS = 48, 64
LOG_BLOCKS = 192  # a ring: transaction t lies in block t % LOG_BLOCKS
START_BALANCE = 1000
TIMEOUT_S = 60.0
RETRY_S = 0.1
_HEADER = struct.Struct(">8sQ")  # magic, checkpoint: pages hold every transaction up to this one
_PAGE = struct.Struct(f">8sQQ{SLOTS}q")  # magic, page, transaction that changed it last, balances
_LOG = struct.Struct(">8sQ" + 2 * "QQq")  # magic, transaction, and twice: page, slot, new balance
_MAGICS = {_HEADER: b"brdbhead", _PAGE: b"brdbpage", _LOG: b"brdblog1"}

Read = Callable[[str, int], bytes]
"""("data" or "log", block of the database there) to its content."""


def _pack(layout: struct.Struct, *fields: int) -> bytes:
    raw = layout.pack(_MAGICS[layout], *fields).ljust(BLOCK_BYTES - 4, b"#")
    return raw + struct.pack(">I", crc32c(raw))


def _unpack(layout: struct.Struct, raw: bytes) -> tuple[int, ...] | None:
    """None: no whole block of this kind."""
    magic, *fields = layout.unpack_from(raw)
    whole = magic == _MAGICS[layout] and crc32c(raw[:-4]) == int.from_bytes(raw[-4:], "big")
    return tuple(fields) if whole else None


class CorruptError(Exception):
    """The database cannot be recovered; the message says why."""


@dataclass
class State:
    """What recovery makes of an image. ``pages`` are [last transaction, balances…]."""

    checkpoint: int = 0
    last: int = 0
    pages: list[list[int]] = field(default_factory=lambda: [[0] + [START_BALANCE] * SLOTS for _ in range(PAGES)])

    def apply(self, fields: tuple[int, ...]) -> list[int]:
        """Redo a transaction; returns the pages it is about."""
        self.last = fields[0]
        for page, slot, balance in (fields[1:4], fields[4:7]):
            self.pages[page][1 + slot] = balance
            self.pages[page][0] = self.last
        return [fields[1], fields[4]]


def recover(read: Read) -> State:
    """As the database itself does after a crash. Raises CorruptError."""
    header = _unpack(_HEADER, read("data", 0))
    if header is None:
        raise CorruptError("its header is torn or missing")
    state = State(checkpoint=header[0], last=header[0])
    stored = []
    for number in range(PAGES):
        page = _unpack(_PAGE, read("data", 1 + number))
        if page is None or page[0] != number:
            raise CorruptError(f"page {number} is torn or missing")
        state.pages[number] = list(page[1:])
        stored.append(page[1])
    log = [_unpack(_LOG, read("log", block)) for block in range(LOG_BLOCKS)]
    while (entry := log[(state.last + 1) % LOG_BLOCKS]) is not None and entry[0] == state.last + 1:
        # Balances are absolute: redoing what a page holds already, or is beyond, ends at the newest.
        state.apply(entry)
    newest = max((entry[0] for entry in log if entry is not None), default=0)
    if newest > state.last:
        raise CorruptError(f"its log holds transaction {newest}, but ends at {state.last}: a hole, or reused too early")
    ahead = [number for number, last in enumerate(stored) if last > state.last]
    if ahead:
        raise CorruptError(f"page {ahead[0]} holds transaction {stored[ahead[0]]}, its log ends at {state.last}")
    total = sum(sum(page[1:]) for page in state.pages)
    if total != PAGES * SLOTS * START_BALANCE:
        raise CorruptError(f"money came or went: {total} instead of {PAGES * SLOTS * START_BALANCE}")
    return state


def image_reader(data: Path, log: Path) -> Read:
    """From image files, under whatever serves them."""
    paths = {"data": data, "log": log}

    def read(where: str, block: int) -> bytes:
        fd = os.open(paths[where], os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, BLOCK_BYTES, PLACE_BYTES + block * BLOCK_BYTES)
        finally:
            os.close(fd)

    return read


class Database(threading.Thread):
    """Runs transactions until `end`. After an error it opens its volumes anew and recovers, as databases do."""

    def __init__(self, address: Callable[[str], str], seed: str, *, committed: int = 0, fresh: bool = False) -> None:
        super().__init__(name="database", daemon=True)
        self.committed = committed  # the last transaction whose log block was acknowledged
        self.recoveries = 0
        self.errors: list[str] = []
        self.broken: list[str] = []
        self._address = address
        self._random = random.Random(f"{seed}/database")
        self._ending = threading.Event()
        self.fresh = fresh  # nothing of it is there yet
        self._volumes: dict[str, NbdVolume] = {}

    def end(self) -> None:
        """After the transaction under way."""
        self._ending.set()
        self.join(2 * TIMEOUT_S)
        if self.is_alive():
            self.broken.append("the database does not end: a command has no answer")

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                self._open()
                self._work(self._begin())
            except OSError as error:
                self.errors.append(str(error))
                self._ending.wait(RETRY_S)
            except CorruptError as error:
                self.broken.append(f"the database where it is served: {error}")
                break
            except Exception as error:  # a thread that dies silently proves nothing
                self.broken.append(f"the database: {error!r}")
                break
            finally:
                self._close()

    def _open(self) -> None:
        for name in ("data", "log"):
            self._volumes[name] = NbdVolume(self._address(name), TIMEOUT_S)

    def _close(self) -> None:
        for volume in self._volumes.values():
            with suppress(OSError):
                volume.close()
        self._volumes.clear()

    def _read(self, where: str, block: int) -> bytes:
        return self._volumes[where].read(PLACE_BYTES + block * BLOCK_BYTES, BLOCK_BYTES)

    def _write(self, where: str, block: int, raw: bytes, *, durable: bool = False) -> None:
        self._volumes[where].write(PLACE_BYTES + block * BLOCK_BYTES, raw, durable=durable)

    def _begin(self) -> State:
        if self.fresh:
            state = State()
            self._checkpoint(state, set(range(PAGES)))
            self.fresh = False
            return state
        state = recover(self._read)
        self.recoveries += 1
        if state.last < self.committed:
            raise CorruptError(f"it ends at transaction {state.last}, but {self.committed} was committed")
        self._checkpoint(state, set(range(PAGES)))
        return state

    def _work(self, state: State) -> None:
        dirty: set[int] = set()
        while not self._ending.is_set():
            entry = self._transfer(state)
            self._write("log", entry[0] % LOG_BLOCKS, _pack(_LOG, *entry), durable=True)
            self.committed = entry[0]
            dirty.update(state.apply(entry))
            if self._random.random() < 0.3:
                page = self._random.choice(sorted(dirty))
                self._write("data", 1 + page, _pack(_PAGE, page, *state.pages[page]))
                dirty.discard(page)
            if state.last - state.checkpoint >= self._random.randrange(LOG_BLOCKS // 2, LOG_BLOCKS):
                self._checkpoint(state, dirty)

    def _transfer(self, state: State) -> tuple[int, ...]:
        (giver, taker), amount = self._random.sample(range(PAGES * SLOTS), 2), self._random.randrange(1, 100)
        entry = [state.last + 1]
        for account, change in ((giver, -amount), (taker, amount)):
            page, slot = divmod(account, SLOTS)
            entry += [page, slot, state.pages[page][1 + slot] + change]
        return tuple(entry)

    def _checkpoint(self, state: State, dirty: set[int]) -> None:
        for page in sorted(dirty):
            self._write("data", 1 + page, _pack(_PAGE, page, *state.pages[page]))
        self._volumes["data"].flush()
        self._write("data", 0, _pack(_HEADER, state.last), durable=True)
        state.checkpoint = state.last
        dirty.clear()
