"""The operator of groups whose sites change roles: what the command line does, and what it judges by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from blockrepl.cli import groups
from blockrepl.errors import NotRunningError
from blockrepl.node.base import epoch_json
from blockrepl.node.data_status import source_status, target_status
from blockrepl.replication.opening import Phase as OpeningPhase
from blockrepl.replication.reform import Phase as ReformPhase
from blockrepl.replication.reform import Reform
from blockrepl.replication.secondary import Phase
from blockrepl.replication.takeover import Phase as TakeoverPhase
from blockrepl.replication.takeover import Takeover
from tests.sim.data_process import DataProcess
from tests.sim.process import IntermediateProcess, Process

if TYPE_CHECKING:
    from tests.sim.sites import SitesGroup

Then = Callable[[str], None]
"""Called with what went wrong, or nothing; never when the asked process dies."""


class _Definition:
    """As much of one as `cli.groups` asks for."""

    name = "sim"

    def node(self, name: str) -> str:
        """By name."""
        return name


class Operator:
    """Types commands. What is typed at a process that is away has no effect."""

    def __init__(self, group: SitesGroup) -> None:
        self.group = group
        self.swaps = self.takeovers = self.replaced = 0  # that were done

    # what is known

    def _answers(self, process: Process) -> bool:
        return process.alive and process.host is not None and process.paused_until_s <= self.group.world.now_s

    def statuses(self) -> list[dict[str, Any]]:
        """Of the processes that answer, as much as `cli.groups` looks at."""
        found = []
        for name, process in self.group.processes.items():
            if not self._answers(process):
                continue
            if isinstance(process, DataProcess):
                role = "primary" if process.site == 0 else "secondary"
                source = process.source
                names = {v: str(v) for v in process.volume_ids}
                shown = source_status(source.host, names) if source is not None else target_status(process.host)
                found.append({**shown, "node": name, "role": role})
            else:
                middle = process.host.role
                found.append({
                    "node": name, "role": "intermediate", "state": middle.phase.value,
                    "epoch": epoch_json(middle.state.epoch), "pair": middle.pairing.shown.name,
                })  # fmt: skip
        return found

    def pair(self) -> str:
        """Of the group."""
        return groups.group_pair(self.statuses())

    def source(self) -> DataProcess | None:
        """Whom to ask for a swap or a replacement."""
        return self._asked(groups.source_to_ask)

    def target(self) -> DataProcess | None:
        """Who is to lead a takeover."""
        return self._asked(groups.target_to_ask)

    def _asked(self, who: Any) -> DataProcess | None:
        try:
            name = cast(str, who(_Definition(), self.statuses()))
        except NotRunningError:
            return None
        process = self.group.processes[name]
        assert isinstance(process, DataProcess)
        return process

    # commands

    def swap(self, then: Then, *, force: bool = False) -> None:
        """`pair resync --swap`: from PAIR it takes over first, and loses nothing."""
        if self.pair() not in ("PAIR", "PFUL"):
            self.reform(then, force=force)
            return
        leader = self.target()
        if leader is None:
            then("no target answers")
            return

        def rehearsed(role: Takeover) -> None:
            if role.phase is not TakeoverPhase.DONE or not role.report.lossless:
                then(f"a swap loses nothing, but: {role.problem or 'it would'}")
            else:
                self.take_over(leader.name, taken_over, planned=True)

        def taken_over(problem: str) -> None:
            then(problem) if problem else self.reform(then, planned=True)

        self._enter(leader, lambda: leader.take_over(rehearsed, dry_run=True, planned=True), then)

    def reform(
        self, then: Then, *, replaced: str = "", force: bool = False, verify: bool = False, planned: bool = False
    ) -> None:
        """At a source of the newest epoch."""
        source = self.source()
        if source is None:
            then("no node serves volumes as a source")
            return
        number = self.group.processes[replaced].node_id if replaced else 0

        def done(role: Reform) -> None:
            if role.phase is ReformPhase.DONE:
                self.swaps += not replaced
                self.replaced += bool(replaced)
                self.group.world.say("", f"formed anew above {role.plan.number}: {role.plan.reasons}")
            then(role.problem)

        self.group.world.say("", f"operator at {source.name}: {f'replace {replaced}' if replaced else 'resync --swap'}")
        self._enter(
            source, lambda: source.reform(done, replaced=number, force=force, verify=verify, planned=planned), then
        )

    def take_over(
        self, name: str, then: Then, *, dry_run: bool = False, force: bool = False, planned: bool = False
    ) -> None:
        """`takeover` at a node."""
        process = self.group.processes[name]
        assert isinstance(process, DataProcess)

        def done(role: Takeover) -> None:
            if role.phase is TakeoverPhase.DONE:
                self.takeovers += not dry_run
                self.group.oracle.taken_over(role)
            then(role.problem)

        self.group.world.say("", f"operator at {name}: takeover{' --dry-run' * dry_run}{' --force' * force}")
        self._enter(process, lambda: process.take_over(done, dry_run=dry_run, force=force, planned=planned), then)

    def _enter(self, process: DataProcess, command: Callable[[], str], then: Then) -> None:
        if not self._answers(process):
            then(f"{process.name} is away")
            return
        refused: list[str] = []
        self.group.world.enter(process, lambda: refused.append(command()))
        if refused and refused[0]:
            self.group.world.say("", f"refused: {refused[0]}")
            then(refused[0])

    def wipe(self, name: str) -> None:
        """A node is lost; an empty one is started in its place."""
        process = self.group.processes[name]
        process.crash("lost for good")
        process.machine.renew()
        process.format()
        self.group.oracle.wiped(process)
        self.group.world.say("", f"{name} was replaced by an empty one")
        process.power_on()
        process.boot()

    # bringing a group back

    @property
    def new(self) -> list[str]:
        """Nodes that were just made, in a group that was not."""
        found = []
        for name, process in self.group.processes.items():
            if process.alive and process.host is not None and not process.host.role.state.epoch.number:
                found.append(name)
        return found if len(found) < len(self.group.processes) else []

    def advice(self) -> Callable[[Then], None] | None:
        """What `explain` would tell to type next; None when there is nothing to be done, or only to wait."""
        group = self.group
        middle = group.processes["i"]
        assert isinstance(middle, IntermediateProcess)
        data = [process for process in group.processes.values() if isinstance(process, DataProcess)]
        if any(process.opener is not None for process in data):
            return None
        source = self.source()
        sites = [process for process in data if source is not None and process.site == source.site]
        begun = [p for p in data if p.host.role.state.rolling and p.host.role.phase not in (Phase.ACTIVE, Phase.FAILED)]
        if source is None or begun:
            asked = begun[0] if begun else next((p for p in data if p.source is None), None)
            return None if asked is None else lambda then: self.take_over(asked.name, then)
        if any(process.source is None for process in sites):
            led = next(process for process in sites if process.source is None)
            return lambda then: self.take_over(led.name, then)
        new = self.new
        if new:
            return lambda then: self.reform(then, replaced=new[0])
        others = [process for process in data if process.site != source.site]
        role = middle.host.role
        left = any(process.source is not None for process in others)
        epochs = {process.host.role.state.epoch for process in (*sites, *others, middle)}
        if left or role.state.direction != source.site:
            return lambda then: self.reform(then)
        if role.phase is OpeningPhase.FENCED or (len(epochs) > 1 and role.phase is not OpeningPhase.SERVING):
            return lambda then: self.reform(then)
        return self._resync if role.phase is OpeningPhase.SERVING else None

    def _resync(self, then: Then) -> None:
        group, pairing = self.group, self.group.intermediate.host.role.pairing
        if pairing.pair.name in ("PSUS", "PSUE", "PFUS") and pairing.step.value == "nothing":
            refused = group.pair("resync")
            if "--verify" in refused:
                group.pair("verify")
        then("")
