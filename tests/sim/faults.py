"""What can go wrong, and the operator's doings."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from blockrepl.formats.journal import RING_OFFSET
from blockrepl.replication.takeover import Takeover
from tests.sim.damage import HARMLESS, verdict_of
from tests.sim.plan import STEPS_A_SECOND, USUAL_S, Planned, plan
from tests.sim.process import Process

if TYPE_CHECKING:
    from tests.sim.group import Group

NAMES = ("p1", "p2", "i", "s1", "s2")
LINKS = [("p1", "i"), ("p2", "i"), ("i", "s1"), ("i", "s2"), ("s1", "s2")]
SITES = {"primary": ["p1", "p2"], "intermediate": ["i"], "secondary": ["s1", "s2"]}
FOR_EVER = 1 << 30
PACE = 3.0  # a run of few steps has fewer faults than one of seconds: else its hosts get nothing done


class Faults:
    """Performs the plan of a group, until `stop`."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.world = group.world
        self.random: Random = group.random  # of the fault that is being performed
        self._stopped = False
        options = group.options
        seconds = options.steps / STEPS_A_SECOND if options.steps else options.seconds
        pace = min(1.0, PACE * seconds / USUAL_S) if options.steps else 1.0
        self._outages = pace  # how long they are, of the usual
        self.plan = plan(group.seed, group.story, seconds, options.fault_every_s, options.faults, pace)
        for each in self.plan:
            if options.keep is None or each.number in options.keep:
                self.world.after(each.at_s, lambda each=each: self._perform(each))  # type: ignore[misc]
        self._kinds: dict[str, Callable[[], None]] = {
            "kill": self._kill, "kill in mid-step": self._kill_in_step, "kill two": self._kill_two,
            "pause": self._pause, "power": self._power, "site": self._site, "cut": self._cut,
            "cut one way": self._cut_one_way, "isolate": self._isolate, "reset": self._reset,
            "late": self._late,
            "disk error": self._disk_error, "disk broken": self._disk_broken, "disk full": self._disk_full,
            "flipped bits": self._flip, "slow disk": self._slow_disk, "wall clock": self._wall_clock,
            "clock rate": self._clock_rate, "dry run": self._dry_run, "operator": self._operator,
            "attempt": self._attempt, "disaster": self._disaster, "takeover": self._try_takeover,
            "split": self._split, "resync": self._resync, "mode": self._mode, "verify": self._verify,
        }  # fmt: skip

    def stop(self) -> None:
        """No more."""
        self._stopped = True

    def _perform(self, planned: Planned) -> None:
        if not self._stopped:
            self.random = self.group.chance or planned.chance()
            self.group.result.faults += 1
            self.group.performed.append(planned.number)
            self._kinds[planned.kind]()

    def _later(self, delay_s: float, what: Callable[[], object]) -> None:
        def unless_stopped() -> None:
            if not self._stopped:
                what()

        self.world.after(delay_s, unless_stopped)

    def _say(self, text: str) -> None:
        self.world.say("", text)

    def _anybody(self) -> Process:
        return self.group.processes[self.random.choice(NAMES)]

    def _down_s(self) -> float:
        return self.random.choice([0.02, 0.2, 1.5]) * self._outages

    # processes

    def _kill(self) -> None:
        process = self._anybody()
        process.crash()
        self._later(self._down_s(), process.boot)

    def _kill_two(self) -> None:
        for name in self.random.sample(NAMES, 2):
            process = self.group.processes[name]
            process.crash()
            self._later(self._down_s(), process.boot)

    def _kill_in_step(self) -> None:
        process = self._anybody()
        process.kill_in = self.random.randint(1, 30)
        self._later(1.0, process.boot)
        self._later(2.0, process.boot)

    def _pause(self) -> None:
        process = self._anybody()
        if process.alive:
            seconds = self.random.choice([0.05, 0.4, 1.5, 3.0]) * self._outages
            self._say(f"{process.name} is stopped (SIGSTOP) for {seconds} s")
            process.paused_until_s = self.world.now_s + seconds

    def _power(self) -> None:
        self._cut_power([self.random.choice(NAMES)])

    def _site(self) -> None:
        self._cut_power(SITES[self.random.choice(list(SITES))])

    def _cut_power(self, names: list[str]) -> None:
        down_s = self._down_s()
        for name in names:
            process = self.group.processes[name]
            process.cut_power()

            def on(name: str = name) -> None:
                self.group.processes[name].power_on()
                self.group.processes[name].boot()

            self._later(down_s + self.random.uniform(0, 0.1), on)

    # the network

    def _outage_s(self) -> float:
        return self.random.choice([0.05, 0.5, 1.5, 3.0]) * self._outages

    def _cut(self) -> None:
        one, other = self.random.choice(LINKS)
        self._say(f"the link {one} - {other} is cut")
        self.group.network.cut(one, other)
        self._later(self._outage_s(), lambda: self.group.network.heal(one, other))

    def _cut_one_way(self) -> None:
        one, other = self.random.choice(LINKS)
        if self.random.random() < 0.5:
            one, other = other, one
        self._say(f"what {one} sends to {other} is lost")
        self.group.network.cut(one, other, both=False)
        self._later(self._outage_s(), lambda: self.group.network.heal(one, other, both=False))

    def _isolate(self) -> None:
        name = self.random.choice(NAMES)
        self._say(f"{name} is cut off")
        for other in NAMES:
            self.group.network.cut(name, other)

        def heal() -> None:
            for other in NAMES:
                self.group.network.heal(name, other)

        self._later(self._outage_s(), heal)

    def _reset(self) -> None:
        if self.group.network.connections:
            connection = self.random.choice(self.group.network.connections)
            names = [process.name for process in connection.processes]
            self._say(f"a connection {' - '.join(names)} breaks")
            connection.drop()

    def _late(self) -> None:
        """What one end of a connection sends comes late, though newer connections work; then that end dies, perhaps."""
        seconds = self.random.choice([0.1, 0.4, 1.2])
        connections = self.group.network.connections
        if self.random.random() < 0.4 or not connections:
            self._late_greeting(self.group.processes[self.random.choice(("p1", "p2", "i"))], seconds)
            return
        connection, side = self.random.choice(connections), self.random.choice([0, 1])
        sender, receiver = connection.processes[side], connection.processes[1 - side]
        self._say(f"what {sender.name} sends to {receiver.name} on this connection comes {seconds} s late")
        connection.held_until_s[side] = self.world.now_s + seconds
        if self.random.random() < 0.6:
            self._later(self.random.choice([0.001, 0.01, 0.05]), sender.crash)
            self._later(0.06, sender.boot)

    def _late_greeting(self, process: Process, seconds: float) -> None:
        """Its HELLO is under way when it dies, and arrives long after that of its successor."""
        self._say(f"the first words of {process.name} after its next start come {seconds} s late")
        process.crash()
        self.group.network.late_dials[process.name] = seconds
        process.boot()
        self._later(self.random.choice([0.01, 0.03]), process.crash)
        self._later(0.05, process.boot)

    # disks

    def _disk_error(self) -> None:
        """Once, at the Nth operation."""
        self._break_disk("fails", times=1, code=errno.EIO)

    def _disk_broken(self) -> None:
        """For good: a restart does not help until the disk is seen to."""
        self._break_disk("fails from now on", times=FOR_EVER, code=errno.EIO)

    def _disk_full(self) -> None:
        self._break_disk("finds no space from now on", times=FOR_EVER, code=errno.ENOSPC)

    def _break_disk(self, how: str, times: int, code: int) -> None:
        process = self._anybody()
        name = self.random.choice(list(process.machine.files))
        kind = "write" if code == errno.ENOSPC else self.random.choice(["write", "sync"])
        after = self.random.choice([0, 0, 1, 5])
        self._say(f"{process.name}: the {kind} of {name} after the next {after} {how}")
        self.group.oracle.excused.add(process.name)
        process.machine.files[name].fail(kind, after=after, times=times, code=code)
        for _ in range(self.random.randint(0, 2)):
            self._later(self.random.uniform(0.05, 1), lambda: self._restart(process))

        def repaired() -> None:
            for each in process.machine.files.values():
                each.mend()
            self._restart(process)
            self.group.oracle.excused.discard(process.name)

        self._later(self.random.uniform(0.1, 2), repaired)

    @staticmethod
    def _restart(process: Process) -> None:
        process.crash("restarted by the operator")
        process.boot()

    def _flip(self) -> None:
        """A bit changes while a node is down; a file that is the worse for it comes back from a backup."""
        process = self._anybody()
        process.crash("taken down")
        name = self.random.choice([name for name in process.machine.files if name in ("journal", "state")])
        file = process.machine.files[name]
        file.written_back()  # else a power cut may bring back an older head, and what was given up counts again
        before = file.copy()
        within = RING_OFFSET if self.random.random() < 0.3 else len(file.platter)
        file.flip(self.random.randrange(min(within, len(file.platter))), self.random.randrange(8))
        verdict = verdict_of(process, name, before)
        self._say(f"{process.name}: a bit of {name} flips: {verdict}")
        if verdict != HARMLESS:
            file.cache[:], file.platter[:], file.pending = before.cache, before.platter, before.pending
        self._later(self._down_s(), process.boot)

    def _slow_disk(self) -> None:
        process = self._anybody()
        if process.alive:
            self.world.say(process.name, "has a slow disk for a while")
            process.disk.slow_until_s = self.world.now_s + self.random.uniform(0.2, 1.5)

    # clocks

    def _wall_clock(self) -> None:
        process = self._anybody()
        process.machine.clock.wall_offset_s = self.random.choice([-1e8, -3600, -1, 1, 3600, 1e8])
        self._say(f"the wall clock of {process.name} jumps by {process.machine.clock.wall_offset_s} s")

    def _clock_rate(self) -> None:
        process = self._anybody()
        rate = self.random.uniform(0.72, 1.4)
        process.machine.clock.drift(rate)
        self._say(f"the clock of {process.name} runs at {rate:.2f}")

    # the operator

    def _dry_run(self) -> None:
        self.group.operate(self.random.choice(["s1", "s2"]), dry_run=True)

    def _operator(self) -> None:
        """A dry run typed twice, or at two nodes."""
        names = self.random.choice([["s1", "s1"], ["s1", "s2"], ["s2", "s2"]])
        for name in names:
            self._later(self.random.choice([0.0, 0.01]), lambda name=name: self.group.operate(name, dry_run=True))  # type: ignore[misc]

    def _split(self) -> None:
        self.group.pair("split")

    def _resync(self) -> None:
        self.group.pair("resync")

    def _verify(self) -> None:
        self.group.pair("verify")

    def _mode(self) -> None:
        """The intermediate is started in the other mode, unless a resync is under way."""
        process = self.group.intermediate
        process.crash("taken down, to change its mode")
        process.changes_mode = True
        self._later(self._down_s(), process.boot)

    def _attempt(self) -> None:
        """A takeover at a bad moment, perhaps typed twice; its node dies before it ends, mostly."""
        names = self.random.choice([["s1"], ["s2"], ["s1", "s2"], ["s1", "s1"]])
        for name in names:
            self.group.operate(name, force=self.group.may_force and self.random.random() < 0.15)
        if self.random.random() < 0.8:
            victims = self.random.sample(NAMES, self.random.choice([1, 1, 2]))
            power, down_s = self.random.random() < 0.5, self._down_s()
            self._later(self.random.choice([0.005, 0.02, 0.05, 0.2]), lambda: self._strike(victims, power, down_s))

    def _strike(self, names: list[str], power: bool, down_s: float) -> None:
        if power:
            self._cut_power(names)
            return
        for name in names:
            process = self.group.processes[name]
            process.crash()
            self._later(down_s, process.boot)

    def _disaster(self) -> None:
        """The primary site burns, the intermediate perhaps too; the operator takes over until it works."""
        self._say("disaster")
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
