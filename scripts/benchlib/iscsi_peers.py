"""tgt, the iSCSI target in C that Debian ships."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.benchlib.fio import IscsiTarget
from scripts.benchlib.process import NotAvailableError, listens, running
from scripts.benchlib.systems import Running, require_root
from scripts.benchlib.workspace import Workspace, command
from scripts.ports import free_port

_NAME = "iqn.2026-11.org.blockrepl:tgt"
_LUN = 1  # LUN 0 is tgt's own controller


@contextmanager
def tgt(directory: Workspace) -> Iterator[Running]:
    """A tgtd of our own, which knows nothing of another one on this machine."""
    require_root("tgtd")
    image, port = directory.image("tgt"), free_port()
    # Not in the workspace: a Unix socket's path is short.
    with tempfile.TemporaryDirectory(prefix="tgt-") as place:
        socket = Path(place) / "socket"
        environment = [f"TGT_IPC_SOCKET={socket}"]
        argv = ["env", *environment, "tgtd", "-f", "-C", "0", "--iscsi", f"portal=127.0.0.1:{port}"]
        with running(argv, directory.log("tgt")) as child:
            child.wait_until(lambda: listens(port) and socket.with_name("socket.0").exists(), "it does not listen")
            try:
                _define(environment, image)
                yield Running(IscsiTarget(port, _NAME, _LUN, directory.image_bytes), {"tgtd": child.pid}, (image,))
            finally:
                _end(environment)


def _define(environment: list[str], image: Path) -> None:
    _admin(environment, "--op", "new", "--mode", "target", "--tid", "1", "-T", _NAME)
    _admin(environment, "--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", str(_LUN), "-b", str(image))
    _admin(environment, "--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")


def _end(environment: list[str]) -> None:
    """It heeds SIGTERM only when it has no target left."""
    with suppress(NotAvailableError):
        _admin(environment, "--op", "delete", "--force", "--mode", "target", "--tid", "1")


def _admin(environment: list[str], *words: str) -> None:
    command(["env", *environment, "tgtadm", "-C", "0", "--lld", "iscsi", *words])
