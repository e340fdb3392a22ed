"""Groups with an iSCSI target, and how to reach their LUNs."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from scripts.ports import free_ports
from tests.system.group import RealGroup

PLAIN_NODE = "p1"


class PlainGroup(RealGroup):
    """One primary with plain volumes: no pair, so no other node. LUN 0 is "data", LUN 1 "other"."""

    def __init__(
        self, folder: Path, *, size: str = "64MiB", block_bytes: int = 512, portals: int = 1, more: str = "",
        nbd_port: int = 0,
    ) -> None:  # fmt: skip
        self._size, self._block_bytes, self._nbd_port = size, block_bytes, nbd_port
        super().__init__(folder, iscsi_portals=portals, more=more)

    def _text(self, journal: str, secondary_journal: str, sizes: dict[str, str], policy: str, keys: str) -> str:
        portals = ", ".join(f'"127.0.0.1:{port}"' for port in free_ports(self._portals))
        lines = ["[group]", 'name = "plain"', f"block_size = {self._block_bytes}", "[[node]]", f'name = "{PLAIN_NODE}"']
        lines += ['role = "primary"', 'directory = "p1"', f"iscsi = [{portals}]"]
        lines += [f'nbd = "127.0.0.1:{self._nbd_port}"'] if self._nbd_port else []
        for name in ("data", "other"):
            lines += ["[[volume]]", f'name = "{name}"', f'size = "{self._size}"', f'primary = "{PLAIN_NODE}"']
            lines += ['secondary = "none"', 'frontends = ["iscsi"]']
        return "\n".join(lines) + "\n"

    def start(self, *names: str, wait: bool = True, options: tuple[str, ...] = ()) -> Self:
        return super().start(*names or (PLAIN_NODE,), wait=wait, options=options)


def portals(group: RealGroup, node: str) -> list[tuple[str, int]]:
    """Where a node's target listens."""
    return [(portal.host, portal.port) for portal in group.node(node).iscsi or ()]


def url(group: RealGroup, node: str, lun: int, *, portal: int = 0) -> str:
    """A LUN as libiscsi and QEMU name it."""
    host, port = portals(group, node)[portal]
    return f"iscsi://{host}:{port}/{group.definition.target_name}/{lun}"
