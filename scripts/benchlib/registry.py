"""The systems by the names that tables and JSON use."""

from __future__ import annotations

from scripts.benchlib import disk, iscsi_peers, loop_peers, nbd_peers, ours
from scripts.benchlib.systems import Factory

FACTORIES: dict[str, Factory] = {
    "blockrepl-nbd": ours.nbd,
    "nbdkit": nbd_peers.nbdkit,
    "qemu-nbd": nbd_peers.qemu_nbd,
    "blockrepl-replicated": ours.replicated,
    "qemu-mirror": nbd_peers.qemu_mirror,
    "blockrepl-loop": ours.loop,
    "loop-qemu-fuse": loop_peers.qemu_fuse,
    "loop-nbdfuse": loop_peers.nbdfuse,
    "blockrepl-iscsi": ours.iscsi,
    "tgt": iscsi_peers.tgt,
    "disk": disk.raw,
}
