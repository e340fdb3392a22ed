"""The story `sites`: both sites are data nodes; swaps, disasters, takebacks and replacements, under faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from blockrepl.formats.link import Pair
from blockrepl.replication.opening import Phase as OpeningPhase
from tests.sim.data_process import DataProcess
from tests.sim.faults import NAMES, Faults
from tests.sim.group import Group, Options, Result
from tests.sim.hosts import Hosts
from tests.sim.operator import Operator
from tests.sim.process import IntermediateProcess, Layout, Process
from tests.sim.sites_oracle import SitesOracle
from tests.sim.world import Violation

REST_S = 90.0  # the time that a healed group, and its operator, have to come to PAIR


class SitesGroup(Group):
    """Two data nodes at each site, and an intermediate."""

    oracle: SitesOracle
    sites_hosts: Sequence[Hosts] = ()  # of both sites

    def _layout(self, options: Any, ring: int, random: Random) -> Layout:
        layout = super()._layout(replace(options, volumes=max(2, options.volumes or 2)), ring, random)
        chance = Random(f"{self.seed} sites")
        layout.policy = replace(
            layout.policy, fence_never=chance.random() < 0.4, suspend_when_full=chance.random() < 0.5
        )
        return layout

    def _make_oracle(self) -> SitesOracle:
        return SitesOracle(self.world, self.layout)

    def _processes(self) -> dict[str, Process]:
        name, number = self.layout.intermediate
        found: dict[str, Process] = {
            each: DataProcess(self.world, self.network, self.layout, each, node)
            for each, node in self.layout.primaries.items()
        }
        found[name] = IntermediateProcess(self.world, self.network, self.layout, name, number)
        for each, node in self.layout.secondaries.items():
            found[each] = DataProcess(self.world, self.network, self.layout, each, node)
        for process in found.values():
            process.watcher = self.oracle
        self.operator = Operator(self)
        return found

    def data(self, name: str) -> DataProcess:
        """A data node."""
        process = self.processes[name]
        assert isinstance(process, DataProcess)
        return process

    def site(self, number: int) -> list[DataProcess]:
        """The data nodes of a site."""
        return [self.data(name) for name in self.layout.sources(number)]

    def begin_work(self, threads: int | None = None) -> None:
        threads = threads or self.options.threads or self.threads
        self.sites_hosts = [
            Hosts(
                self.world, self.oracle, {v: self.data(str(ends[site])) for v, ends in self.layout.volumes.items()},
                threads, self.max_blocks,
            )
            for site in (0, 1)
        ]  # fmt: skip

    def run(self) -> Result:
        with self.limits():
            self.create()
            self.begin_work()
            faults = SitesFaults(self)
            self.world.run(self.options.until_s or self.options.seconds)
            faults.stop()
            self.rest()
        result, oracle, world, operator = self.result, self.oracle, self.world, self.operator
        result.steps, result.records, result.completions = world.steps, len(oracle.records), oracle.completions
        result.errors = sum(hosts.errors for hosts in self.sites_hosts)
        result.digests = sum(hosts.digests for hosts in self.sites_hosts)
        result.taken_over = oracle.taken_over_at is not None
        result.takeovers, result.swaps, result.replaced = operator.takeovers, operator.swaps, operator.replaced
        result.reforms, result.copied_bytes, result.differed_bytes = (
            oracle.reforms,
            oracle.copied_bytes,
            oracle.differed_bytes,
        )
        return result

    # the end

    def stopped(self, process: Process) -> bool:  # type: ignore[override]
        if isinstance(process, DataProcess):
            return process.failed
        return bool(process.host.role.phase is OpeningPhase.FAILED)

    def rest(self) -> None:
        """Heal; the operator does what is told to be typed next, until all is in PAIR."""
        self.world.say("", "everything is healed")
        self.heal()
        for hosts in self.sites_hosts:
            hosts.stopped = True
        self.world.run(self.world.now_s + 0.5)
        problems: list[str] = []
        until_s = self.world.now_s + REST_S
        while not self.world.run(self.world.now_s + 1.5, self.quiet) and self.world.now_s < until_s:
            self.heal()
            command = self.operator.advice()
            if command is not None:
                command(problems.append)
        if not self.quiet():
            raise Violation(f"12, liveness: {list(dict.fromkeys(problems[-4:]))} {self.picture()}")
        self.check_equal()
        self.oracle.check_images(self.processes)

    def quiet(self) -> bool:
        """PAIR, all applied, every write answered."""
        middle = self.intermediate
        if not all(process.alive for process in self.processes.values()):
            return False
        role = middle.host.role
        return (
            role.phase is OpeningPhase.SERVING
            and role.streams.validated == role.numbered == self.oracle.numbered
            and role.pairing.pair is Pair.PAIR
            and role.pairing.step.value == "nothing"
            and not any(hosts.waiting for hosts in self.sites_hosts)
            and all(p.primary is not None and p.primary.role.live and p.primary.role.why_held() == ""
                    for p in self.site(role.state.direction))
            and all(p.source is None and p.host.role.applied == role.numbered and not p.host.role.state.copying
                    for p in self.site(1 - role.state.direction))
        )  # fmt: skip

    def check_equal(self) -> None:
        oracle = self.oracle
        for volume, ends in self.layout.volumes.items():
            expected = oracle.image(volume, oracle.numbered)
            for name in map(str, ends[:2]):
                if bytes(self.processes[name].machine.files[f"volume {volume}"].cache) != expected:
                    raise Violation(f"{name}: volume {volume} at rest is not image({oracle.numbered})")

    def picture(self) -> str:
        parts = []
        for name, process in self.processes.items():
            if not process.alive:
                parts.append(f"{name} is down")
                continue
            role = process.host.role
            state = role.state
            words = f"{name} {role.phase.value} epoch {state.epoch.number}/{state.promised.number}"
            if isinstance(process, DataProcess):
                words += f" received {role.received} validated {role.validated} applied {role.applied}"
                words += f" copying {state.copying} {role.copying.stage.value}" * state.copying
                if process.source is not None:
                    source = process.source.host.role
                    words += f" source {source.phase.value} acked {source.acked} {source.why_held()}"
            else:
                streams, pairing = role.streams, role.pairing
                words += f" numbered {role.numbered} validated {streams.validated} {role.opening.reason}"
                words += f" {pairing.pair.name} {pairing.step.value} towards {1 - state.direction}"
            parts.append(words)
        return "; ".join(parts)

    def trial(self) -> None:
        from tests.sim.sites_trial import trial

        self.result.trials += 1
        trial(self)


def group_for(seed: int, options: Options, chance: Random | None = None) -> Group:
    """The kind of group that a story is about."""
    return (SitesGroup if options.story == "sites" else Group)(seed, options, chance)


class SitesFaults(Faults):
    """What the operator does, between faults, at bad moments too."""

    group: SitesGroup

    def __init__(self, group: SitesGroup) -> None:
        self._commands = 0
        super().__init__(group)
        self._kinds |= {
            "swap": self._swap, "burn": self._burn, "take over": self._somewhere, "replace": self._replace,
            "replace and burn": self._replace_lost,
        }  # fmt: skip

    def _dry_run(self) -> None:
        self.group.operator.take_over(self.random.choice(["s1", "s2", "p1", "p2"]), lambda _: None, dry_run=True)

    def _operator(self) -> None:
        for name in self.random.choice([["s1", "s2"], ["p1", "p2"], ["s1", "p1"]]):
            self.group.operator.take_over(name, lambda _: None, dry_run=True)

    def _strike_soon(self, share: float) -> None:
        """A node dies while the command is at work, perhaps."""
        if self.random.random() < share:
            victims = self.random.sample(NAMES, self.random.choice([1, 1, 2]))
            power, down_s = self.random.random() < 0.5, self._down_s()
            self._later(self.random.choice([0.005, 0.02, 0.05, 0.2, 0.6]), lambda: self._strike(victims, power, down_s))

    def _swap(self) -> None:
        """Typed; perhaps twice; a second time if it was not done."""
        random = self.random
        again, twice, strike = random.random() < 0.7, random.random() < 0.15, random.random()

        def then(problem: str) -> None:
            if problem and again:
                self._later(1.0, lambda: self.group.operator.swap(lambda _: None))

        self.group.operator.swap(then)
        if twice:
            self.group.operator.swap(lambda _: None)
        if strike < 0.5:
            self._strike_soon(1.0)

    def _targets(self) -> list[DataProcess]:
        source = self.group.operator.source()
        return self.group.site(1 - source.site) if source is not None else []

    def _somewhere(self) -> None:
        """A takeover with everything at work, or not."""
        targets = self._targets()
        if targets:
            self._persist(self.random.choice(targets).name, 3)
            self._strike_soon(0.4)

    def _persist(self, name: str, tries: int) -> None:
        def then(problem: str) -> None:
            if problem and tries > 1:
                self._later(0.7, lambda: self._persist(name, tries - 1))

        self.group.operator.take_over(name, then)

    def _burn(self) -> None:
        """The source site burns, the intermediate perhaps too; a takeover; later all come back, and then a takeback."""
        source, random = self.group.operator.source(), self.random
        if source is None:
            return
        self._say("disaster")
        names = [process.name for process in self.group.site(source.site)] + ["i"] * (random.random() < 0.4)
        self._cut_off(names)
        heir = random.choice(self.group.site(1 - source.site)).name
        self._later(random.choice([0.05, 0.5, 1.5]), lambda: self._persist(heir, 4))
        if random.random() < 0.8:
            self._later(random.uniform(3.5, 5.0), lambda: self.group.operator.swap(lambda _: None))

    def _cut_off(self, names: list[str]) -> None:
        """Power, processes or the network of a site are gone, until much later."""
        random, network = self.random, self.group.network
        how, back_s = random.choice(["power", "power", "kill", "network"]), random.uniform(1.5, 3.0)
        rest = [name for name in NAMES if name not in names]
        for name in names:
            process = self.group.processes[name]
            if how == "power":
                process.cut_power()
            elif how == "kill":
                process.crash()
            else:
                for other in rest:
                    network.cut(name, other)

        def back() -> None:
            for name in names:
                for other in rest if how == "network" else ():
                    network.heal(name, other)
                self.group.processes[name].power_on()
                self.group.processes[name].boot()

        self._later(back_s, back)

    def _whole(self) -> bool:
        """All is well: one node may be lost, and nothing is lost with it."""
        middle = self.group.intermediate
        if (
            not middle.alive
            or self.group.operator.pair() != "PAIR"
            or not all(process.alive and process.machine.powered for process in self.group.processes.values())
        ):
            return False
        direction = middle.host.role.state.direction
        return middle.host.role.phase is OpeningPhase.SERVING and all(
            process.primary is not None and process.primary.role.live for process in self.group.site(direction)
        )

    def _replace(self) -> None:
        """The intermediate or a target is lost, and replaced by an empty one."""
        if not self._whole():
            return
        name = self.random.choice(["i", *(process.name for process in self._targets())])
        self.group.operator.wipe(name)
        self._later(self.random.choice([0.05, 0.4]), lambda: self._reform_for(name, 3))
        self._strike_soon(0.3)

    def _reform_for(self, name: str, tries: int) -> None:
        def then(problem: str) -> None:
            if problem and tries > 1:
                self._later(0.8, lambda: self._reform_for(name, tries - 1))

        if name in self.group.operator.new:
            self.group.operator.reform(then, replaced=name)

    def _replace_lost(self) -> None:
        """A source burns down for good: takeover, then an empty one in its place."""
        source = self.group.operator.source()
        if source is None or not self._whole():
            return
        heir = self.random.choice(self.group.site(1 - source.site)).name

        def then(problem: str) -> None:
            if problem:
                self._later(0.7, lambda: self.group.operator.take_over(heir, then))
            elif all(process.host.role.state.active for process in self.group.site(1 - source.site)):
                self.group.operator.wipe(source.name)
                self._later(0.3, lambda: self._reform_for(source.name, 3))

        source.crash("burns")
        self.group.operator.take_over(heir, then)
        self._strike_soon(0.3)
