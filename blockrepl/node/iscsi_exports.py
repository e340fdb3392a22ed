"""The iSCSI target of a node: the volumes it holds as logical units, whether it serves them now or not.

A node that holds a volume publishes it always, with the same LUN and identity on every node, so that an initiator sees
paths to one disk. Which path works now is its asymmetric access state (SPC-4, 5.15.2): active where the volume is
served, standby at a secondary that follows, unavailable where nothing can be served.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockrepl.block import Volume
from blockrepl.chunks import ChunkPool
from blockrepl.definition import Definition, Node
from blockrepl.definition import Volume as DefinedVolume
from blockrepl.definition.iscsi import Chap
from blockrepl.errors import UsageError
from blockrepl.frontends.iscsi.chap import MIN_SECRET_BYTES, Credentials
from blockrepl.frontends.iscsi.login import Access, TargetDescription
from blockrepl.frontends.iscsi.scsi.identity import UnitIdentity
from blockrepl.frontends.iscsi.scsi.target import Target
from blockrepl.frontends.iscsi.scsi.unit import LogicalUnit, PathState
from blockrepl.frontends.iscsi.server import IscsiServer

MAX_SECRET_BYTES = 255


class IscsiExports:
    """Of a node that has portals. Needs the running loop. Raises UsageError (secrets)."""

    def __init__(self, definition: Definition, node: Node, pool: ChunkPool) -> None:
        assert node.iscsi is not None
        self._definition = definition
        self._node = node
        loop = asyncio.get_running_loop()
        self._device = Target(pool, loop.call_later, node.id)
        description = TargetDescription(
            definition.target_name, f"group {definition.name}", node.id, _access(definition)
        )  # fmt: skip
        portals = [(portal.host, portal.port, each.id) for each in definition.nodes for portal in each.iscsi or ()]
        self._server = IscsiServer(description, self._device, pool, portals=portals)
        self._units: dict[str, tuple[DefinedVolume, LogicalUnit]] = {}
        for volume in definition.volumes_at(node.name):
            if "iscsi" in volume.frontends:
                identity = UnitIdentity(
                    definition.group_id,
                    volume.id,
                    volume.name,
                    volume.size_bytes,
                    definition.block_size_bytes,
                    definition.iscsi.physical_block,
                )
                unit = self._device.add(definition.lun_of(volume), identity, {})
                self._units[volume.name] = volume, unit

    async def listen(self) -> None:
        """Accept initiators at every portal. Raises UsageError."""
        for portal in self._node.iscsi or ():
            await self._server.listen(portal.host, portal.port)

    async def close(self) -> None:
        """End the sessions."""
        await self._server.close()

    def settle(self, served: Mapping[str, Volume], *, failed: bool, following: bool) -> None:
        """Bring the units in line with what is served now. See `Exports.settle`."""
        otherwise = PathState.STANDBY if following and not failed else PathState.UNAVAILABLE
        for name, (defined, unit) in self._units.items():
            volume = None if failed and defined.replicated else served.get(name)
            if volume is None:
                if unit.volume is not None or unit.state is not otherwise:
                    unit.withdraw(otherwise)
            elif unit.volume is not volume:
                unit.serve(volume)
            else:
                unit.check_size()
            unit.other_paths.update(self._other_paths(defined, serving=volume is not None))

    def reconfigure(self, definition: Definition) -> None:
        """Volumes may have grown: initiators hear of it, through paths that do not serve too."""
        self._definition = definition
        for name, (_, unit) in list(self._units.items()):
            volume = definition.volume(name)
            self._units[name] = volume, unit
            unit.resized(volume.size_bytes)

    def _other_paths(self, volume: DefinedVolume, *, serving: bool) -> dict[int, int]:
        """States of the other node's port group, as far as they can be known here."""
        if not volume.replicated:
            return {}
        other = volume.secondary if volume.primary == self._node.name else volume.primary
        node = self._definition.node(other)
        if node.iscsi is None:
            return {}
        if not serving:
            return {node.id: PathState.ACTIVE_OPTIMIZED}
        return {node.id: PathState.STANDBY if node.role == "secondary" else PathState.UNAVAILABLE}

    # to look at

    def units(self) -> dict[str, LogicalUnit]:
        """By volume name."""
        return {name: unit for name, (_, unit) in self._units.items()}

    def url(self, name: str) -> str | None:
        """The URL of a logical unit at the first portal, as libiscsi and QEMU write it."""
        if name not in self._units or not self._node.iscsi:
            return None
        return f"iscsi://{self._node.iscsi[0]}/{self._definition.target_name}/{self._units[name][1].lun}"

    def entry(self, name: str) -> dict[str, Any] | None:
        """What status says of one volume."""
        if name not in self._units:
            return None
        unit = self._units[name][1]
        return {"url": self.url(name), "lun": unit.lun, "state": _STATES[unit.state]}

    def sessions(self) -> list[dict[str, Any]]:
        """Sessions, discovery too."""
        return [
            {
                "frontend": "iscsi", "peer": s.peer, "initiator": s.initiator, "user": s.user or None,
                "discovery": s.discovery, "requests": s.commands, "in_flight": s.in_flight,
            }
            for s in self._server.sessions()
        ]  # fmt: skip


_STATES = {
    PathState.ACTIVE_OPTIMIZED: "active/optimized", PathState.STANDBY: "standby", PathState.UNAVAILABLE: "unavailable",
}  # fmt: skip


def _access(definition: Definition) -> Access:
    iscsi = definition.iscsi
    return Access(iscsi.initiators, _credentials(iscsi.chap) if iscsi.chap is not None else None)


def _credentials(chap: Chap) -> Credentials:
    users = {user.name: read_secret(user.secret_file) for user in chap.users}
    mutual = None
    if chap.mutual is not None:
        mutual = chap.mutual.name, read_secret(chap.mutual.secret_file)
        if mutual[1] in users.values():
            raise UsageError(
                f"{chap.mutual.secret_file}: the target has the secret of a user",
                hint="each direction needs a secret of its own (RFC 7143, 9.2.1)",
            )
    return Credentials(users, mutual, chap.allow_md5)


def read_secret(path: Path) -> bytes:
    """The first line of a file that only its owner can read. Raises UsageError."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read(MAX_SECRET_BYTES + 2).partition(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise UsageError(f"{path}: the secret cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise UsageError(f"{path}: others may read this secret (mode {mode:04o})", hint=f"chmod 600 {path}")
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise UsageError(
            f"{path}: a secret has {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, this has {len(secret)}",
            hint=f"(umask 077; openssl rand -hex 16 > {path})",
        )
    return secret
