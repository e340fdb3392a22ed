"""A takeover on copies of what the targets hold durably, whichever site they are at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockrepl.formats.record import RecordHead
from blockrepl.replication.opening import Phase as OpeningPhase
from blockrepl.replication.secondary import Phase, Secondary
from blockrepl.replication.takeover import Phase as TakeoverPhase
from blockrepl.replication.takeover import Takeover
from tests.sim.data_process import DataProcess
from tests.sim.network import Network
from tests.sim.oracle import demand
from tests.sim.process import Watcher
from tests.sim.world import Violation, World

if TYPE_CHECKING:
    from tests.sim.sites import SitesGroup

PATIENCE_S = 30.0


class TrialWatcher(Watcher):
    """What a target recovers after the power cut is all that it had reported."""

    def __init__(self, group: SitesGroup) -> None:
        self._group = group

    def recovered(self, process: Any, heads: list[RecordHead], role: Any) -> None:
        if isinstance(role, Secondary):
            reported = self._group.oracle.prepared.get(process.name, 0)
            demand(
                role.held >= reported, f"4: {process.name} reported prepared {reported}; after a power cut {role.held}"
            )


def trial(group: SitesGroup) -> None:
    """Only while the group works: nobody opens an epoch. Raises Violation."""
    middle = group.intermediate
    if not middle.alive or middle.host.role.phase is not OpeningPhase.SERVING:
        return
    targets = group.site(1 - middle.host.role.state.direction)
    epoch = middle.host.role.state.epoch
    if any(p.host is None or p.host.role.state.epoch != epoch or p.host.role.state.active for p in targets):
        return
    oracle = group.oracle
    world = World(group.random.getrandbits(32))
    network = Network(world)
    copies = []
    for original in targets:
        copy = DataProcess(world, network, group.layout, original.name, original.node_id)
        copy.machine.files = {key: file.copy() for key, file in original.machine.files.items()}
        copy.machine.cut_power()
        copy.watcher = TrialWatcher(group)
        copies.append(copy)
    for copy in copies:
        copy.boot()
    finished: list[Takeover] = []
    back = [copy.host.role.copying.newest.copy_from for copy in copies if copy.host.role.copying.newest is not None]
    copies[0].take_over(finished.append)
    if not world.run(PATIENCE_S, lambda: bool(finished)):
        raise Violation("a trial takeover does not end")
    role = finished[0]
    if role.phase is not TakeoverPhase.DONE:
        if "an initial copy has not ended" in role.problem:
            return
        raise Violation(f"a trial takeover fails: {role.problem}")
    low = min([oracle.validate_sent, *back])
    demand(role.report.number >= low, f"3: trial at {role.report.number}, VALIDATE {oracle.validate_sent} sent")
    for copy in copies:
        if copy.host.role.phase is not Phase.ACTIVE:
            raise Violation(f"{copy.name} is {copy.host.role.phase.value} after a trial takeover")
        oracle.check_active(copy)
