"""The tables of a definition, and look-ups in them. What `load` returns has been checked."""

from __future__ import annotations

import difflib
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from blockrepl.definition.iscsi import NAME_PREFIX, Iscsi, Portals
from blockrepl.definition.values import Address, Size
from blockrepl.errors import DefinitionError, UsageError

NO_SECONDARY = "none"
GROUP_NAMESPACE = uuid.UUID(
    "5cf2a1c6-51a7-5d0c-9a0c-6f0d6e9c7b11"
)  # a random one; changing it changes every derived id

Role = Literal["primary", "intermediate", "secondary"]
Frontend = Literal["nbd", "loop", "iscsi"]


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The consistency group."""

    name: str
    id: uuid.UUID | None = None
    block_size: int = 4096
    journal: Size = Size(256 << 20)
    secondary_journal: Size = Size(256 << 20)
    mode: Literal["journal", "volumes"] = "journal"
    fence: Literal["data", "never"] = "data"
    on_full: Literal["suspend", "block"] = "suspend"
    bitmap_block: Size = Size(64 << 10)


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often and how long. Seconds and bytes."""

    heartbeat_s: float = 1.0
    link_timeout_s: float = 5.0
    hold_s: float = 30.0
    lease_s: float = 3.0
    checkpoint_s: float = 5.0
    checkpoint_bytes: Size = Size(64 << 20)
    round_s: float = 0.01
    round_bytes: Size = Size(8 << 20)


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node. ``directory`` is absolute after `load`; ``id`` is its place in the file unless given."""

    name: str
    role: Role
    directory: Path
    host: str = "local"
    listen: Address | None = None
    nbd: Address | None = None
    iscsi: Portals | None = None
    journal: Path | None = None
    id: int = 0

    @property
    def journal_path(self) -> Path:
        """Where its journal is made; a running node's may have been moved."""
        return self.journal or self.directory / "journal"

    @property
    def control_path(self) -> Path:
        """Of the control socket. May be longer than a socket address allows: reach it through the directory."""
        return self.directory / "control.sock"

    @property
    def site(self) -> int:
        """The direction of the group while this node is a source: 0 for a primary, 1 for a secondary."""
        return int(self.role == "secondary")

    @property
    def address(self) -> Address:
        """Where its peers dial. A primary without one can be no target."""
        assert self.listen is not None, f"node {self.name} does not listen"
        return self.listen


class Volume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One volume: its P-VOL, and its S-VOL unless ``secondary`` is "none". ``id`` as for `Node`."""

    name: str
    size: Size
    primary: str
    secondary: str
    frontends: tuple[Frontend, ...] = ("nbd", "loop", "iscsi")
    lun: int | None = None
    id: int = 0

    @property
    def size_bytes(self) -> int:
        """A plain integer."""
        return int(self.size)

    @property
    def replicated(self) -> bool:
        """False for SMPL: a plain target without a pair."""
        return self.secondary != NO_SECONDARY


class Definition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole file. ``path`` is where it was read."""

    group: Group
    nodes: tuple[Node, ...] = msgspec.field(name="node")
    volumes: tuple[Volume, ...] = msgspec.field(name="volume")
    policy: Policy = Policy()
    iscsi: Iscsi = Iscsi()
    path: Path = msgspec.field(name="(path)", default=Path())

    @property
    def name(self) -> str:
        """Of the group."""
        return self.group.name

    @property
    def group_id(self) -> uuid.UUID:
        """The identity that journals and links carry; derived from the name when the file gives none."""
        return self.group.id or uuid.uuid5(GROUP_NAMESPACE, self.group.name)

    @property
    def block_size_bytes(self) -> int:
        """512 or 4096."""
        return self.group.block_size

    @property
    def target_name(self) -> str:
        """Of the iSCSI target."""
        return self.iscsi.target or NAME_PREFIX + self.group.name

    @property
    def primaries(self) -> tuple[Node, ...]:
        """In file order."""
        return tuple(node for node in self.nodes if node.role == "primary")

    @property
    def secondaries(self) -> tuple[Node, ...]:
        """In file order."""
        return tuple(node for node in self.nodes if node.role == "secondary")

    def sources(self, direction: int) -> tuple[Node, ...]:
        """The nodes that are copied from: primaries with a pair, or secondaries with one when it is swapped (1)."""
        return tuple(self.node(name) for name in self._ends(direction))

    def targets(self, direction: int) -> tuple[Node, ...]:
        """The nodes that are copied to."""
        return self.sources(1 - direction)

    def _ends(self, site: int) -> list[str]:
        ends = {volume.secondary if site else volume.primary for volume in self.volumes if volume.replicated}
        return [node.name for node in self.nodes if node.name in ends]

    def owners(self, direction: int) -> dict[int, int]:
        """Replicated volume → the source that serves it, by ids."""
        return {
            volume.id: self.node(volume.secondary if direction else volume.primary).id
            for volume in self.volumes if volume.replicated
        }  # fmt: skip

    def homes(self, direction: int) -> dict[int, int]:
        """Replicated volume → the target that keeps its copy, by ids."""
        return self.owners(1 - direction)

    @property
    def volumes_mode(self) -> bool:
        """The intermediate keeps an image of every replicated volume too."""
        return self.group.mode == "volumes"

    @property
    def replicated(self) -> bool:
        """True when at least one volume has a secondary; then there is an intermediate."""
        return any(volume.replicated for volume in self.volumes)

    @property
    def intermediate(self) -> Node:
        """The one intermediate. Raises DefinitionError in a group of plain targets that has none."""
        for node in self.nodes:
            if node.role == "intermediate":
                return node
        raise DefinitionError(f"{self.path}: $.node", "this group has no intermediate: it only has plain targets")

    def node(self, name: str) -> Node:
        """The node called ``name``. Raises UsageError that names those there are."""
        return _lookup("node", name, self.nodes, self.path)

    def volume(self, name: str) -> Volume:
        """The volume called ``name``. Raises UsageError that names those there are."""
        return _lookup("volume", name, self.volumes, self.path)

    def lun_of(self, volume: Volume) -> int:
        """Its logical unit number: the same on every node; its place in the file, from 0, unless given."""
        return volume.lun if volume.lun is not None else self.volumes.index(volume)

    def volumes_at(self, node: str) -> tuple[Volume, ...]:
        """Those of which ``node`` keeps an image, at whichever end."""
        return tuple(volume for volume in self.volumes if node in (volume.primary, volume.secondary))

    def end(self, volume: Volume, site: int) -> Node:
        """The node of a site that keeps the volume; 0 is the site of the primaries."""
        return self.node(volume.secondary if site else volume.primary)

    def volumes_of_primary(self, node: str) -> tuple[Volume, ...]:
        """Those whose P-VOL is at ``node``."""
        return tuple(volume for volume in self.volumes if volume.primary == node)

    def volumes_of_secondary(self, node: str) -> tuple[Volume, ...]:
        """Those whose S-VOL is at ``node``."""
        return tuple(volume for volume in self.volumes if volume.secondary == node)

    def local_nodes(self) -> tuple[Node, ...]:
        """Those that belong on this machine: host "local", or its host name, short or full."""
        hostname = socket.gethostname()
        here = {"local", hostname, hostname.partition(".")[0]}
        return tuple(node for node in self.nodes if node.host in here)


Named = TypeVar("Named", Node, Volume)


def _lookup(noun: str, name: str, items: Sequence[Named], path: Path) -> Named:
    for item in items:
        if item.name == name:
            return item
    names = [item.name for item in items]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(names)}"
    raise UsageError(f'{path} has no {noun} "{name}"', hint=hint)
