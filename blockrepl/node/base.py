"""What the three kinds of node share: directory lock, control socket, ticking, stopping, status."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from blockrepl.chunks import ChunkPool
from blockrepl.definition import Configuration, Definition, Node, configuration_from
from blockrepl.definition.changes import differs, fixed_facts
from blockrepl.errors import InUseError, MissingError, TimeoutExpiredError, UsageError
from blockrepl.formats.link import Epoch
from blockrepl.node.asyncio_ports import SystemClock, ThreadWorkers
from blockrepl.node.config_file import ConfigFile
from blockrepl.node.control import ControlServer, Handler, Progress
from blockrepl.node.create import journal_identity
from blockrepl.node.journal_mover import check_size
from blockrepl.node.links import LinkTable
from blockrepl.replication.policy import Policy
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.journal_move import refuse_stranger

log = logging.getLogger("blockrepl.node")
LOCK_NAME = "lock"
LAST_SAVE_S = 5.0
CONFIG_WAIT_S = 10.0  # for what all nodes together bring about
CONFIG_POLL_S = 0.02
MAX_WRITE_BYTES = 32 << 20


def policy_of(definition: Definition) -> Policy:
    """The roles' policy from a definition's."""
    given = definition.policy
    return Policy(
        heartbeat_s=given.heartbeat_s,
        link_timeout_s=given.link_timeout_s,
        hold_s=given.hold_s,
        lease_s=given.lease_s,
        fence_never=definition.group.fence == "never",
        suspend_when_full=definition.group.on_full == "suspend",
        checkpoint_s=given.checkpoint_s,
        checkpoint_bytes=min(int(given.checkpoint_bytes), _smaller_ring(definition) // _shares(definition)),
        round_s=given.round_s,
        round_bytes=int(given.round_bytes),
        open_backoff_s=given.link_timeout_s,
    )


def _shares(definition: Definition) -> int:
    """Half a ring, shared by the primaries."""
    return 2 * max(2, len(definition.primaries))


def _smaller_ring(definition: Definition) -> int:
    return min(int(definition.group.journal), int(definition.group.secondary_journal))


def max_write_bytes(definition: Definition) -> int:
    """The largest write that hosts may send: it must fit every ring, with what others are granted."""
    ring = _smaller_ring(definition)
    return min(MAX_WRITE_BYTES, ring // (4 * _shares(definition)) // 4096 * 4096)


def lock_directory(node: Node) -> int:
    """Nobody else runs this node until the descriptor is closed. Raises MissingError, InUseError."""
    directory = node.directory
    if not directory.is_dir():
        raise MissingError(f"{directory} is not there", hint="is its disk mounted? `blockrepl create` makes it, once")
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise InUseError(f"{directory}: another process runs this node", hint="see: blockrepl status") from error
    return fd


class NodeBase(ABC):
    """One node: built by its class's ``__init__`` on the running loop, then `start`, and `stop` at the end."""

    tick_s = 0.05

    def __init__(self, definition: Definition, node: Node) -> None:
        self.node = node
        self.loop = asyncio.get_running_loop()
        self.pool = ChunkPool()
        self.clock = SystemClock()
        self.workers = ThreadWorkers()
        self.disk = DiskThread(self.loop, f"disk {node.name}")
        self.links = LinkTable(self.pool)
        self.stopping = asyncio.Event()
        self._lock_fd = lock_directory(node)
        self._written = definition
        self.config = ConfigFile.open(definition, node)
        self.config.drop_old_journal()
        self.definition = self.config.effective.applied_to(definition)
        self._control: ControlServer | None = None
        self._ticker: asyncio.TimerHandle | None = None

    # life

    async def start(self) -> None:
        """Open the control socket, then the role's own listeners and links."""
        self._control = ControlServer(self.node.directory, {**self._handlers(), **self.handlers()})
        await self._control.start()
        await self.open()
        self._tick()

    async def stop(self) -> None:
        """Close everything, the control socket last."""
        if self._ticker is not None:
            self._ticker.cancel()
        await self.close()
        self.links.close_all()
        if self._control is not None:
            await self._control.close()
        self.disk.close()
        self.workers.close()
        os.close(self._lock_fd)

    def _tick(self) -> None:
        self._ticker = self.loop.call_later(self.tick_s, self._tick)
        self.tick()

    @abstractmethod
    async def open(self) -> None:
        """Listen and dial."""

    @abstractmethod
    async def close(self) -> None:
        """Front ends, listeners, diallers."""

    @abstractmethod
    def tick(self) -> None:
        """Time passes."""

    @abstractmethod
    def handlers(self) -> dict[str, Handler]:
        """Control commands beside status and stop."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What docs/status.md says, without the parts common to all roles."""

    # configuration

    @property
    def held(self) -> Definition:
        """The definition that the node's files are made for: in effect, or prepared."""
        return self.config.held.applied_to(self._written)

    def prepare(self, configuration: Configuration) -> None:
        """Make files for a configuration that is to take effect. Can be repeated. Raises UsageError, StorageError."""
        self.check_prepared(configuration)
        self.config.prepare(configuration)
        self.enlarge()
        self.prepared()

    def check_prepared(self, configuration: Configuration) -> None:
        """Whether `prepare` may begin. Raises UsageError."""
        configuration.applied_to(self._written)
        rows = {row.id: row for row in configuration.volumes}
        held = {row.id: row for row in self.config.held.volumes}
        if set(rows) != set(held):
            raise UsageError(
                "volumes are not added to a running group, or removed", hint="see: blockrepl adjust --dry-run"
            )
        for number, row in rows.items():
            if row.size < held[number].size:
                raise UsageError(
                    f"{self.node.name} has files for {held[number].size} bytes of volume {row.name} already",
                    hint=f'write size = "{held[number].size}" or more',
                )

    def take(self, digest: int, number: int) -> None:
        """A configuration is in effect from ``number`` on. Raises StorageError."""
        if self.config.take(digest, number):
            self.definition = self.config.effective.applied_to(self._written)
            log.info("configuration %016x is in effect from number %d on", digest, number)
            self.took()
            self.prepared()

    @abstractmethod
    def enlarge(self) -> None:
        """Make the files as large as `held` says. Raises StorageError."""

    @abstractmethod
    def prepared(self) -> None:
        """Tell the roles which configuration the files are made for."""

    @abstractmethod
    def took(self) -> None:
        """Another configuration is in effect: hosts see what it says."""

    # control

    def _handlers(self) -> dict[str, Handler]:
        return {
            "status": self._status, "stop": self._stop, "config": self._config, "config_prepare": self._config_prepare,
            "config_wait": self._config_wait, "journal_move": self._journal_move,
        }  # fmt: skip

    async def _config(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return {
            "node": self.node.name, "number": self.config.number, "configuration": to_builtins(self.config.effective),
            "digest": self.config.effective.digest,
            "prepared": self.config.prepared.digest if self.config.prepared is not None else None,
            "fixed": fixed_facts(self._written), "journal": self.journal_report(),
        }  # fmt: skip

    async def _config_prepare(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        configuration = configuration_from(args.get("configuration"))
        if args.get("dry_run"):
            self.check_prepared(configuration)
        else:
            self.prepare(configuration)
        return {"digest": configuration.digest}

    async def _status(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        common = {
            "schema": 1,
            "group": self.definition.name,
            "node": self.node.name,
            "role": self.node.role,
            "pid": os.getpid(),
            "config": {
                "digest": f"{self.config.effective.digest:016x}", "number": self.config.number,
                "prepared": f"{self.config.prepared.digest:016x}" if self.config.prepared is not None else None,
                "differs": differs(self.config.effective, self._written),
            },
        }  # fmt: skip
        return {**common, **self.status()}

    async def _journal_move(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Move the journal to another file, or give it another size. Nothing, when it is there already."""
        path, ring_bytes = Path(str(args.get("path"))), int(args.get("ring_bytes") or 0)
        if not path.is_absolute():
            raise UsageError(f"{path} is no absolute path", hint="blockrepl adjust")
        if self.journal_report() != {"path": str(path), "ring_bytes": ring_bytes}:
            check_size(ring_bytes, max_write_bytes(self.definition))
            if args.get("dry_run"):
                refuse_stranger(path, self.config.journal, journal_identity(self.definition, self.node))
            else:
                await self.move_journal(path, ring_bytes)
        return {"journal": self.journal_report()}

    def journal_report(self) -> dict[str, Any] | None:
        """Where the journal lies, and its size; None at a node without one."""
        return None

    async def move_journal(self, path: Path, ring_bytes: int) -> None:
        """See `_journal_move`. Raises UsageError, StorageError."""
        raise UsageError(f"{self.node.name} has plain volumes only, and no journal", hint="see: blockrepl status")

    async def _config_wait(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Until a configuration is in effect here. Raises TimeoutExpiredError."""
        deadline_s = self.clock.now_s() + CONFIG_WAIT_S
        while self.config.effective.digest != args.get("digest"):
            if self.clock.now_s() > deadline_s:
                raise TimeoutExpiredError(
                    f"{self.node.name} has not come to the configuration yet", hint="see: blockrepl status"
                )
            await asyncio.sleep(CONFIG_POLL_S)
        return {"number": self.config.number}

    async def _stop(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        self.stopping.set()
        return {"stopping": True}


async def save_last(journal: JournalFile, state: bytes) -> None:
    """A clean end: the superblock then vouches for the newest frames, so that damage to them is noticed."""
    if journal.failed is None:
        saved = asyncio.Event()
        journal.commit()
        journal.save(state, done=saved.set)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(saved.wait(), LAST_SAVE_S)


def epoch_json(epoch: Epoch) -> dict[str, Any] | None:
    """For status; null for none."""
    return {"number": epoch.number, "id": epoch.id.hex()} if epoch.number else None


def history_json(history: list[tuple[Epoch, int]]) -> list[dict[str, Any]]:
    """For status: epochs that a node has worked in, oldest first, each with the last number of it."""
    return [{"number": epoch.number, "id": epoch.id.hex(), "last": last} for epoch, last in history]


def volume_argument(args: dict[str, Any], names: list[str]) -> str:
    """The "volume" argument of a command, checked. Raises UsageError."""
    name = args.get("volume")
    if not isinstance(name, str) or name not in names:
        raise UsageError(f"no volume {name!r} on this node", hint=f"there is {', '.join(names) or 'none'}")
    return name


def journal_report(journal: JournalFile) -> dict[str, Any]:
    """For the control command "config"."""
    return {"path": str(journal.path), "ring_bytes": journal.journal.ring_bytes}
