"""The schedule of faults, and the operator's doings, as the seed has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockrepl.replication.takeover import Takeover

if TYPE_CHECKING:
    from tests.sim.group import Group

NAMES = ("p1", "p2", "i", "s1", "s2")


class Faults:
    """Something goes wrong every now and then, until `stop`."""

    def __init__(self, group: Group) -> None:
        from tests.sim.group import LINKS, SITES

        self.group = group
        self.world = group.world
        self.random = random = group.random
        self._links, self._sites = LINKS, SITES
        self._stopped = False
        self._every_s = group.options.fault_every_s or random.choice([0.2, 0.6, 2.0])
        kinds: dict[str, Callable[[], None]] = {
            "kill": self._kill, "kill in mid-step": self._kill_in_step, "power": self._power, "site": self._site,
            "cut": self._cut, "isolate": self._isolate, "reset": self._reset, "disk error": self._disk_error,
            "slow disk": self._slow_disk, "dry run": self._dry_run, "kill two": self._kill_two,
        }  # fmt: skip
        if group.options.faults is not None:
            kinds = {name: kind for name, kind in kinds.items() if name in group.options.faults}
        elif random.random() < 0.5:
            kept = random.sample(sorted(kinds), random.randint(2, 6))
            kinds = {name: kind for name, kind in kinds.items() if name in kept}
        self._kinds = kinds
        self.world.after(random.uniform(0.3, 1.0), self._next)
        if group.story == "attempts":
            self.world.after(random.uniform(0.5, 3), self._attempt)
        elif group.story == "disaster":
            self.world.after(random.uniform(1, group.options.seconds / 2), self._disaster)
        elif group.story == "planned":
            self.world.after(random.uniform(1, group.options.seconds / 2), self._try_takeover)

    def stop(self) -> None:
        """No more."""
        self._stopped = True

    def _next(self) -> None:
        if self._stopped:
            return
        self.world.after(self.random.expovariate(1 / self._every_s), self._next)
        if self._kinds:
            name = self.random.choice(list(self._kinds))
            self.group.result.faults += 1
            self._kinds[name]()

    def _later(self, delay_s: float, what: Callable[[], object]) -> None:
        def unless_stopped() -> None:
            if not self._stopped:
                what()

        self.world.after(delay_s, unless_stopped)

    def _down_s(self) -> float:
        return self.random.choice([0.02, 0.2, 1.5])

    def _kill(self) -> None:
        process = self.group.processes[self.random.choice(NAMES)]
        process.crash()
        self._later(self._down_s(), process.boot)

    def _kill_two(self) -> None:
        for name in self.random.sample(NAMES, 2):
            process = self.group.processes[name]
            process.crash()
            self._later(self._down_s(), process.boot)

    def _kill_in_step(self) -> None:
        process = self.group.processes[self.random.choice(NAMES)]
        process.kill_in = self.random.randint(1, 30)
        self._later(1.0, process.boot)
        self._later(2.0, process.boot)

    def _power(self) -> None:
        self._cut_power([self.random.choice(NAMES)])

    def _site(self) -> None:
        self._cut_power(self._sites[self.random.choice(list(self._sites))])

    def _cut_power(self, names: list[str]) -> None:
        down_s = self._down_s()
        for name in names:
            process = self.group.processes[name]
            process.cut_power()

            def on(name: str = name) -> None:
                self.group.processes[name].power_on()
                self.group.processes[name].boot()

            self._later(down_s + self.random.uniform(0, 0.1), on)

    def _cut(self) -> None:
        one, other = self.random.choice(self._links)
        self.world.say("", f"the link {one} - {other} is cut")
        self.group.network.cut(one, other)
        self._later(self.random.choice([0.05, 0.5, 1.5, 3.0]), lambda: self.group.network.heal(one, other))

    def _isolate(self) -> None:
        name = self.random.choice(NAMES)
        self.world.say("", f"{name} is cut off")
        for other in NAMES:
            self.group.network.cut(name, other)

        def heal() -> None:
            for other in NAMES:
                self.group.network.heal(name, other)

        self._later(self.random.choice([0.05, 0.5, 1.5, 3.0]), heal)

    def _reset(self) -> None:
        if self.group.network.connections:
            connection = self.random.choice(self.group.network.connections)
            names = [process.name for process in connection.processes]
            self.world.say("", f"a connection {' - '.join(names)} breaks")
            connection.drop()

    def _disk_error(self) -> None:
        process = self.group.processes[self.random.choice(NAMES)]
        name = self.random.choice(list(process.machine.files))
        file = process.machine.files[name]
        kind = self.random.choice(["write", "sync"])
        self.world.say(process.name, f"the next {kind} of {name} fails")
        self.group.oracle.excused.add(process.name)
        if kind == "write":
            file.fail_writes = 1
        else:
            file.fail_syncs = 1

        def restart() -> None:
            for each in process.machine.files.values():
                each.fail_writes = each.fail_syncs = 0
            process.crash("restarted by the operator")
            process.boot()
            self.group.oracle.excused.discard(process.name)

        self._later(self.random.uniform(0.1, 2), restart)

    def _slow_disk(self) -> None:
        process = self.group.processes[self.random.choice(NAMES)]
        if process.alive:
            self.world.say(process.name, "has a slow disk for a while")
            process.disk.slow_until_s = self.world.now_s + self.random.uniform(0.2, 1.5)

    # the operator

    def _dry_run(self) -> None:
        self.group.operate(self.random.choice(["s1", "s2"]), dry_run=True)

    def _attempt(self) -> None:
        """A takeover at a bad moment; its node dies before it ends, mostly."""
        if self._stopped:
            return
        self.world.after(self.random.expovariate(1 / 2.5), self._attempt)
        names = self.random.choice([["s1"], ["s2"], ["s1", "s2"]])
        for name in names:
            self.group.operate(name, force=self.group.may_force and self.random.random() < 0.15)
        if self.random.random() < 0.8:
            victims = self.random.sample(NAMES, self.random.choice([1, 1, 2]))
            self._later(self.random.choice([0.005, 0.02, 0.05, 0.2]), lambda: self._strike(victims))

    def _strike(self, names: list[str]) -> None:
        if self.random.random() < 0.5:
            self._cut_power(names)
            return
        for name in names:
            process = self.group.processes[name]
            process.crash()
            self._later(self._down_s(), process.boot)

    def _disaster(self) -> None:
        """The primary site burns, the intermediate perhaps too; the operator takes over until it works."""
        self.world.say("", "disaster")
        names = ["p1", "p2"] + (["i"] if self.random.random() < 0.5 else [])
        for name in names:
            process = self.group.processes[name]
            if self.random.random() < 0.5:
                process.cut_power()
            else:
                process.crash()
            if self.random.random() < 0.3:
                for other in NAMES:
                    self.group.network.cut(name, other)
        self._try_takeover()

    def _try_takeover(self) -> None:
        def done(role: Takeover) -> None:
            if role.problem:
                self._later(0.5, self._try_takeover)

        self.group.operate(self.random.choice(["s1", "s2"]), done)
        self._later(5.0, lambda: None if self.group.active else self._try_takeover())
