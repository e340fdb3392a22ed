"""The network between the nodes: links that can be cut in one direction or both, and healed.

With namespaces every node has an own one, joined by veth pairs and a bridge in a further one; a cut is a rule in the
receiver's namespace that drops what comes from the sender, silently. Without, proxies hold what they should carry.
"""

from __future__ import annotations

import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from scripts.demolib.group import ROOT
from scripts.demolib.process import environment
from scripts.ports import free_ports
from scripts.torturelib.enclosure import enter_network_namespace as _enter_namespace
from scripts.torturelib.errors import TortureError

LINK_PORT, NBD_PORT = 7000, 10809
_LOCAL_TABLE = 255
_LOOPBACK = 1  # its index in every namespace
_START_S = 20.0


class Network(ABC):
    """``nodes`` are names; `HOST` is where the hosts are."""

    kind: str

    @abstractmethod
    def link_address(self, node: str) -> str:
        """Where it listens for other nodes, as HOST:PORT."""

    @abstractmethod
    def nbd_address(self, node: str) -> str:
        """Where it listens for hosts."""

    @abstractmethod
    def seen_from(self, node: str, text: str) -> str:
        """The group's definition as this node must read it."""

    @abstractmethod
    def prefix(self, node: str) -> list[str]:
        """What comes before the command that runs it."""

    @abstractmethod
    def cut(self, sender: str, receiver: str) -> None:
        """Nothing of the sender's arrives at the receiver any more."""

    @abstractmethod
    def heal(self) -> None:
        """Every link is whole."""

    def received_bytes(self, nodes: Iterable[str]) -> int | None:
        """All that was sent to them so far, by anybody; None where nobody counts."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Remove it. Never raises."""


class Namespaces(Network):
    """Needs `enclosure.enter`: what is made here goes with the enclosure."""

    kind = "network namespaces"

    def __init__(self, nodes: Iterable[str]) -> None:
        self._addresses = {node: f"10.77.0.{place}" for place, node in enumerate(nodes, 1)}
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._cuts: list[tuple[str, str]] = []
        with IPRoute() as here:
            here.link("set", index=_LOOPBACK, state="up")
            if not here.link_lookup(ifname="torture"):
                here.link("add", ifname="torture", kind="bridge")
                bridge = here.link_lookup(ifname="torture")[0]
                here.addr("add", index=bridge, address="10.77.0.254", prefixlen=24)
                here.link("set", index=bridge, state="up")
        for node in self._addresses:
            self._join(node)

    def _join(self, node: str) -> None:
        holder = self._holders[node] = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        path = Path(f"/proc/{holder.pid}/ns/net")
        own, deadline_s = Path("/proc/self/ns/net").readlink(), time.monotonic() + _START_S
        while path.readlink() == own:
            if time.monotonic() > deadline_s:
                raise TortureError("a network namespace does not start")
            time.sleep(0.01)
        with IPRoute() as here:
            here.link("add", ifname=f"to-{node}", kind="veth", peer={"ifname": "eth0", "net_ns_pid": holder.pid})
            ours, bridge = here.link_lookup(ifname=f"to-{node}")[0], here.link_lookup(ifname="torture")[0]
            here.link("set", index=ours, master=bridge, state="up")
        with self._inside(node) as inside:
            theirs = inside.link_lookup(ifname="eth0")[0]
            inside.addr("add", index=theirs, address=self._addresses[node], prefixlen=24)
            for index in (theirs, _LOOPBACK):
                inside.link("set", index=index, state="up")
            # The rule for our own addresses comes first by default, and would let in what a cut is to drop.
            inside.rule("add", table=_LOCAL_TABLE, priority=1000, action="FR_ACT_TO_TBL")
            inside.rule("del", table=_LOCAL_TABLE, priority=0)

    @contextmanager
    def _inside(self, node: str) -> Iterator[IPRoute]:
        """A netlink socket in a node's namespace. pyroute2's NetNS would fork us, signal handlers and all."""
        with ExitStack() as stack:
            home, there = (
                stack.enter_context(Path(f"/proc/{pid}/ns/net").open("rb")) for pid in ("self", self._holders[node].pid)
            )
            _enter_namespace(there.fileno())
            try:
                inside = stack.enter_context(IPRoute())
            finally:
                _enter_namespace(home.fileno())
            yield inside

    def link_address(self, node: str) -> str:
        return f"{self._addresses[node]}:{LINK_PORT}"

    def nbd_address(self, node: str) -> str:
        return f"{self._addresses[node]}:{NBD_PORT}"

    def seen_from(self, node: str, text: str) -> str:
        return text

    def prefix(self, node: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._holders[node].pid}/ns/net"]

    def _rule(self, command: str, sender: str, receiver: str) -> None:
        with self._inside(receiver) as inside:
            inside.rule(command, src=self._addresses[sender], src_len=32, action="FR_ACT_BLACKHOLE", priority=10)

    def cut(self, sender: str, receiver: str) -> None:
        if (sender, receiver) not in self._cuts:
            self._rule("add", sender, receiver)
            self._cuts.append((sender, receiver))

    def heal(self) -> None:
        while self._cuts:
            self._rule("del", *self._cuts[-1])
            self._cuts.pop()

    def received_bytes(self, nodes: Iterable[str]) -> int | None:
        with IPRoute() as here:
            ours = {link.get_attr("IFLA_IFNAME"): link.get_attr("IFLA_STATS64") for link in here.get_links()}
        return sum(int(ours[f"to-{node}"]["tx_bytes"]) for node in nodes)

    def close(self) -> None:
        with suppress(NetlinkError), IPRoute() as here:  # a namespace takes its links along, but late
            for node in self._holders:
                here.link("del", ifname=f"to-{node}")
        for holder in self._holders.values():
            holder.kill()
            holder.wait()
            if holder.stdin is not None:
                holder.stdin.close()


class Lines(Network):
    """Proxies on loopback: one for each node and each other node that it may dial."""

    kind = "proxies"

    def __init__(self, nodes: Iterable[str]) -> None:
        self._nodes = list(nodes)
        pairs = [(a, b) for a in self._nodes for b in self._nodes if a != b]
        ports = iter(free_ports(2 * len(self._nodes) + len(pairs)))
        self._ports = {node: (next(ports), next(ports)) for node in self._nodes}
        self._lines = {pair: next(ports) for pair in pairs}
        argv = [f"{port}={self._ports[target][0]}" for (_, target), port in self._lines.items()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.torturelib.lines", *argv], cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(PYTHONPATH=str(ROOT)),
            start_new_session=True,
        )  # fmt: skip
        self._answer("listening")

    def _answer(self, wanted: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != wanted:
            raise TortureError("the proxies between the nodes ended")

    def link_address(self, node: str) -> str:
        return f"127.0.0.1:{self._ports[node][0]}"

    def nbd_address(self, node: str) -> str:
        return f"127.0.0.1:{self._ports[node][1]}"

    def seen_from(self, node: str, text: str) -> str:
        for (dialler, target), port in self._lines.items():
            if dialler == node:
                text = text.replace(f'"{self.link_address(target)}"', f'"127.0.0.1:{port}"')
        return text

    def prefix(self, node: str) -> list[str]:
        return []

    def _set(self, sender: str, receiver: str, state: str) -> None:
        assert self._process.stdin is not None
        for pair, way in (((sender, receiver), "forward"), ((receiver, sender), "backward")):
            print(self._lines[pair], way, state, file=self._process.stdin)
            self._answer("done")

    def cut(self, sender: str, receiver: str) -> None:
        self._set(sender, receiver, "hold")

    def heal(self) -> None:
        for pair in self._lines:
            self._set(*pair, "pass")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
