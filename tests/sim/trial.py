"""A takeover on copies of what the secondaries hold durably, in a world of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockrepl.formats.record import RecordHead
from blockrepl.replication.secondary import Phase, Secondary
from blockrepl.replication.takeover import Phase as TakeoverPhase
from blockrepl.replication.takeover import Takeover
from tests.sim.network import Network
from tests.sim.oracle import demand
from tests.sim.process import Process, SecondaryProcess, Watcher
from tests.sim.world import Violation, World

if TYPE_CHECKING:
    from tests.sim.group import Group

PATIENCE_S = 30.0


class TrialWatcher(Watcher):
    """What a secondary recovers after the power cut is all that it had reported."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def recovered(self, process: Process, heads: list[RecordHead], role: Any) -> None:
        assert isinstance(role, Secondary)
        reported = self._group.oracle.prepared.get(process.name, 0)
        if role.state.rolling:  # a takeover was stored: it may have discarded what another does not hold
            reported = min(reported, role.state.number)
        demand(role.held >= reported, f"{process.name} reported prepared {reported}; after a power cut {role.held}")


def trial(group: Group) -> None:
    """Raises Violation."""
    oracle = group.oracle
    world = World(group.random.getrandbits(32))
    network = Network(world)
    copies: list[SecondaryProcess] = []
    for name, number in group.layout.secondaries.items():
        copy = SecondaryProcess(world, network, group.layout, name, number)
        original = group.processes[name].machine
        copy.machine.files = {key: file.copy() for key, file in original.files.items()}
        copy.machine.cut_power()
        copy.watcher = TrialWatcher(group)
        copies.append(copy)
    for copy in copies:
        copy.boot()
    rolled = [c.host.role.state.number for c in copies if c.host.role.state.rolling]  # a takeover has begun already
    finished: list[Takeover] = []
    copies[0].take_over(finished.append)
    if not world.run(PATIENCE_S, lambda: bool(finished)):
        raise Violation("a trial takeover does not end")
    if finished[0].phase is not TakeoverPhase.DONE:
        if group.forced:  # one may have been rolled beyond what the other holds: said, and up to the operator
            return
        raise Violation(f"a trial takeover fails: {finished[0].problem}")
    number = finished[0].report.number
    low = min([oracle.validate_sent, *rolled, *(c.host.role.state.number for c in copies if oracle.goes_back_to)])
    demand(number >= low or group.forced, f"trial at {number}, VALIDATE {oracle.validate_sent} sent")
    for copy in copies:
        if copy.host.role.phase is not Phase.ACTIVE:
            raise Violation(f"{copy.name} is {copy.host.role.phase.value} after a trial takeover")
        oracle.check_active(copy)
