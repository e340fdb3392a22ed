"""Named scenarios of data nodes at two sites: swap and replacement; see `scenarios.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from blockrepl.block import Op, WriteBatch
from tests.sim.data_process import DataProcess
from tests.sim.group import Options
from tests.sim.oracle import demand
from tests.sim.process import BLOCK
from tests.sim.scenario import NEVER, Unfit
from tests.sim.sites import SitesGroup
from tests.sim.transcript import Steady
from tests.sim.world import Violation
from tests.sim.write import Write


class Sites:
    """Volume 1 goes from p1 to s1, volume 2 from p2 to s2; every delay is a middling one."""

    def __init__(self, **policy: Any) -> None:
        """``policy``: fields of `Policy`."""
        options = Options(story="sites", volumes=2, blocks=64, ring_bytes=1 << 20)
        self.group = group = SitesGroup(0, options, Steady())
        layout = group.layout
        usual = {"hold_s": NEVER, "suspend_when_full": False, "fence_never": False, "checkpoint_s": 0.1}
        layout.policy = replace(layout.policy, **{**usual, **policy})
        self.world = group.world
        self._count = 0
        group.create()
        self.until(group.quiet, "PAIR")

    def until(self, done: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
        """Raises Violation when it does not come."""
        if not self.world.run(self.world.now_s + seconds, done):
            raise Violation(f"12: {what} does not come: {self.group.picture()}")

    def quiet(self, seconds: float) -> None:
        """Let them go on."""
        self.world.run(self.world.now_s + seconds)

    def data(self, name: str) -> DataProcess:
        """A data node."""
        return self.group.data(name)

    def write(self, name: str, volume: int, block: int) -> bytes:
        """A host writes a block, and is answered; what it wrote."""
        self._count += 1
        payload = b"%015d " % self._count * (BLOCK // 16)
        batch = WriteBatch(lambda _: None)
        for column, value in (
            (batch.ops, Op.WRITE), (batch.offsets, block * BLOCK), (batch.lengths, BLOCK), (batch.flags, 0),
            (batch.cookies, self._count),
        ):  # fmt: skip
            column.append(int(value))
        batch.payloads.append(memoryview(payload))
        batch.size_bytes = BLOCK
        oracle, process = self.group.oracle, self.data(name)
        ours = Write(volume, list(batch.ops), list(batch.offsets), [BLOCK], [payload], oracle.completed)
        oracle.host_submits(process, batch, ours)
        answered: list[bool] = []

        def done(batch: WriteBatch) -> None:
            oracle.submitting.pop(id(batch), None)
            answered.append(batch.errors is None)
            if batch.errors is None:
                oracle.complete(process, ours)

        def submit() -> None:
            process.volumes[volume].submit(batch)

        batch.done = done
        self.world.enter(process, submit)
        self.until(lambda: bool(answered), f"the answer to a write of volume {volume}")
        return payload


def valid_as_only_the_sources_know() -> None:
    """Rules 8 and 25: s2 was never told that what it holds is valid; p2 was, and its bits begin behind it."""
    s = Sites()
    middle = s.group.intermediate.host.role
    s.group.network.cut("s2", "i", both=False)  # s2 prepares, and nobody hears of it
    s.write("p2", 2, 5)
    number = middle.numbered
    s.until(lambda: s.data("s2").host.role.state.prepared >= number, "s2 has prepared it")
    s.group.network.cut("i", "s2", both=False)
    s.group.network.heal("s2", "i", both=False)
    s.until(lambda: middle.streams.validated >= number, "the intermediate knows that")
    s.write("p1", 1, 7)  # held by s1 only: the targets are at different numbers
    s.until(lambda: s.data("s1").host.role.held > number, "s1 holds more")
    source = s.data("p2").primary
    assert source is not None
    s.until(lambda: min(source.role.validated, source.role.checkpoints.told) >= number, "p2 forgets the range")
    if s.data("s2").host.role.validated >= number:
        raise Unfit("s2 knows too")
    s.group.operator.wipe("i")
    s.group.network.heal_all()
    problems: list[str] = []
    s.quiet(0.5)
    s.group.operator.reform(problems.append, replaced="i")
    s.until(lambda: bool(problems), "the end of the replacement")
    demand(problems == [""], f"25: {problems}")
    s.until(s.group.quiet, "PAIR")
    s.group.check_equal()


SCENARIOS: list[Callable[[], None]] = [valid_as_only_the_sources_know]
