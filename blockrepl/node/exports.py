"""The front ends of a node: NBD, loop devices and iSCSI over the volumes that it serves now."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from blockrepl.block import Volume
from blockrepl.chunks import ChunkPool
from blockrepl.definition import Definition, Node
from blockrepl.errors import UsageError
from blockrepl.frontends.nbd.server import NbdServer
from blockrepl.node.control import Handler, Progress

if TYPE_CHECKING:
    from blockrepl.frontends.loop.frontend import LoopFrontend
    from blockrepl.node.iscsi_exports import IscsiExports


class Exports:
    """The volumes a node serves, by name. Empty until they may be served (PROTOCOL, rules 7 and 14)."""

    def __init__(self, definition: Definition, node: Node, pool: ChunkPool) -> None:
        self.volumes: dict[str, Volume] = {}
        self._definition = definition
        self._node = node
        self._nbd = NbdServer(lambda: self._with("nbd"), pool)
        self._loop: LoopFrontend | None = None
        self._iscsi: IscsiExports | None = None
        if node.iscsi is not None:  # a node without portals starts without its modules
            from blockrepl.node.iscsi_exports import IscsiExports

            self._iscsi = IscsiExports(definition, node, pool)
        self._listening = False

    def _with(self, frontend: str) -> dict[str, Volume]:
        return {
            name: volume
            for name, volume in self.volumes.items()
            if frontend in self._definition.volume(name).frontends
        }  # fmt: skip

    async def listen(self) -> None:
        """Accept hosts where the node has addresses for them. Raises UsageError."""
        if self._listening:
            return
        self._listening = True
        if self._node.nbd is not None:
            await self._nbd.listen(self._node.nbd.host, self._node.nbd.port)
        if self._iscsi is not None:
            await self._iscsi.listen()

    def reconfigure(self, definition: Definition) -> None:
        """Volumes may have grown: new NBD connections see it; loop devices and iSCSI initiators are told."""
        self._definition = definition
        for name, served in self.volumes.items():
            size_bytes = definition.volume(name).size_bytes
            if served.size_bytes != size_bytes:
                served.size_bytes = size_bytes
                if self._loop is not None:
                    self._loop.resize(name)
        if self._iscsi is not None:
            self._iscsi.reconfigure(definition)

    def settle(self, *, failed: bool, following: bool) -> None:
        """Tell what is published whether it is served or not: at each tick. ``failed``: the node's pairs are; its
        plain volumes are not. ``following``: another node serves."""
        if self._iscsi is not None:
            self._iscsi.settle(self.volumes, failed=failed, following=following)

    def handlers(self) -> dict[str, Handler]:
        """Their control commands."""
        return {"attach": self._attach, "detach": self._detach}

    async def _attach(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        name = self._serving(args)
        if "loop" not in self._definition.volume(name).frontends:
            raise UsageError(f"{name} has no loop front end", hint='add "loop" to its frontends in the definition')
        if self._loop is None:  # its modules take longer to load than all others together
            from blockrepl.frontends.loop.frontend import LoopFrontend

            self._loop = LoopFrontend(lambda: self._with("loop"), self._node.directory)
        return {"device": await self._loop.attach(name, read_only=bool(args.get("read_only")))}

    async def _detach(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        name = str(args.get("volume"))
        if self._loop is None or name not in self._attached():
            raise UsageError(f"{name} is not attached here", hint="see: blockrepl status")
        device = self._attached()[name]
        await self._loop.detach(name)
        return {"device": device}

    def _attached(self) -> dict[str, str]:
        return self._loop.attached() if self._loop is not None else {}

    def _serving(self, args: dict[str, Any]) -> str:
        name = str(args.get("volume"))
        if name not in self.volumes:
            raise UsageError(f"{name} is not served here now", hint="see: blockrepl status")
        return name

    def entry(self, name: str) -> dict[str, Any]:
        """What status says of one volume."""
        active = name in self.volumes
        nbd = self._node.nbd
        has_nbd = active and nbd is not None and "nbd" in self._definition.volume(name).frontends
        return {
            "active": active,
            "attached": self._attached().get(name),
            "nbd": f"nbd://{nbd}/{name}" if has_nbd else None,
            "iscsi": self._iscsi.entry(name) if self._iscsi is not None else None,
        }

    def sessions(self) -> list[dict[str, Any]]:
        """NBD connections and iSCSI sessions."""
        nbd = [
            {
                "frontend": "nbd", "peer": s.peer, "volume": s.export, "requests": s.requests,
                "in_flight": s.in_flight,
            }
            for s in self._nbd.sessions()
        ]  # fmt: skip
        return nbd + (self._iscsi.sessions() if self._iscsi is not None else [])

    async def withdraw(self, name: str) -> None:
        """Serve a volume no more: its hosts are cut off. Nothing when it is not served."""
        if self.volumes.pop(name, None) is None:
            return
        self._nbd.cut_off(name)
        if self._loop is not None:
            await self._loop.cut_off(name)

    async def close(self) -> None:
        """Undo loop devices, end sessions."""
        others = [each.close() for each in (self._loop, self._iscsi) if each is not None]
        await asyncio.gather(self._nbd.close(), *others)
