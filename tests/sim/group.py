"""One run: a group, its hosts, an operator, and a schedule of faults, all from one seed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest import mock

from blockrepl.errors import UsageError
from blockrepl.formats.link import Pair
from blockrepl.replication.opening import Phase as OpeningPhase
from blockrepl.replication.policy import Policy
from blockrepl.replication.secondary import Phase as SecondaryPhase
from blockrepl.replication.takeover import Phase as TakeoverPhase
from blockrepl.replication.takeover import Takeover
from tests.sim.bits import BITMAP_BLOCK
from tests.sim.hosts import Hosts
from tests.sim.network import Network
from tests.sim.oracle import Oracle
from tests.sim.plan import STORIES, USUAL_S, story_of
from tests.sim.process import (
    BLOCK,
    IntermediateProcess,
    Layout,
    PrimaryProcess,
    Process,
    SecondaryProcess,
)
from tests.sim.superset import Superset
from tests.sim.world import Violation, World

START_S = 20.0  # the time that a new group has to come up undisturbed
HEALED_S = 40.0  # the time that a healed group has to come to rest


@dataclass
class Options:
    """What a run is to be; drawn from the seed where None."""

    seconds: float = USUAL_S
    steps: int | None = None  # of a group that is up already, instead of seconds
    threads: int | None = None
    volumes: int | None = None
    blocks: int | None = None  # of a volume
    ring_bytes: int | None = None
    story: str | None = None  # one of plan.STORIES
    fault_every_s: float | None = None
    faults: tuple[str, ...] | None = None
    volumes_mode: bool | None = None  # the intermediate keeps images, at the beginning
    duplicate: float | None = None  # how often a message comes a second time
    strict: bool = False  # a peer that finds another at fault is a violation
    # For the shrinker: the same run with less in it.
    until_s: float | None = None  # hosts and faults end then
    keep: frozenset[int] | None = None  # faults of the plan, by number
    salt: int = 0  # other delays and contents


@dataclass
class Result:
    """What a run did."""

    seed: int
    story: str = ""
    steps: int = 0
    records: int = 0
    completions: int = 0
    errors: int = 0
    digests: int = 0
    faults: int = 0
    trials: int = 0
    supersets: int = 0  # looks at invariant 7
    taken_over: bool = False
    takeovers: int = 0
    swaps: int = 0
    replaced: int = 0
    reforms: int = 0
    copied_bytes: int = 0  # after reforms, in blocks of the bitmap
    differed_bytes: int = 0  # then


@contextlib.contextmanager
def small(ring_bytes: int, cache_bytes: int) -> Iterator[None]:
    """The constants of the hosts, small enough that a run of seconds meets every limit."""
    hosts = "blockrepl.node"
    patches = {
        "blockrepl.storage.journal.RING_MIN_BYTES": 1 << 16,
        f"{hosts}.intermediate_host.CACHE_BYTES": cache_bytes,
        f"{hosts}.intermediate_host.TRANSMIT_BYTES": 24 << 10,
        f"{hosts}.intermediate_host.REPLAY_QUEUE_BYTES": 24 << 10,
        f"{hosts}.secondary_host.CACHE_BYTES": cache_bytes,
        f"{hosts}.applying.SLICE_BYTES": 8 << 10,
        "blockrepl.replication.streams.MAX_OPEN_ROUNDS": 4,  # a note each, of 4 KiB
        "blockrepl.replication.copier.CHUNK_BYTES": 8 << 10,
        f"{hosts}.primary_host.VERIFY_BLOCK_BYTES": BITMAP_BLOCK,  # what differs is copied: a small ring holds it
        f"{hosts}.secondary_host.COMMIT_BYTES": 48 << 10,
    }
    log = logging.getLogger("blockrepl.node.links")
    level = log.level
    log.setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        try:
            yield
        finally:
            log.setLevel(level)


class Group:
    """Two primaries, an intermediate, two secondaries, on a machine each."""

    def __init__(self, seed: int, options: Options | None = None, chance: Random | None = None) -> None:
        """``chance``: instead of what the seed gives."""
        self.seed = seed
        self.options = options = options or Options()
        self.chance = chance
        self.world = world = World(seed, chance or Random(f"{seed} salt {options.salt}"))
        self.random = world.random
        random = chance or Random(f"{seed} layout")
        self.network = Network(world)
        self.network.duplicate = random.choice([0, 0, 0.01])
        self.network.strict = options.strict
        if options.duplicate is not None:
            self.network.duplicate = options.duplicate
        ring = random.choice([128 << 10, 256 << 10, 1 << 20])
        ring = options.ring_bytes or ring
        self.cache_bytes = random.choice([16 << 10, 64 << 10, 48 << 20])
        self.max_blocks = min(16, ring // (16 * 4096) * 4)
        story = story_of(seed, random.choice(STORIES))
        self.story = options.story or story
        self.layout = self._layout(options, ring, random)
        self.oracle = self._make_oracle()
        self.processes = self._processes()
        self.threads = random.choice([1, 4, 12])
        self.performed: list[int] = []  # faults of the plan, by number
        self.may_force = random.random() < 0.3
        self.forced = False  # a forced takeover was begun
        self.result = Result(seed, self.story)
        self.hosts: Hosts
        self._since_images = 0
        self._superset = Superset(self)
        world.checks.append(self._check)

    def _make_oracle(self) -> Any:
        return Oracle(self.world, self.layout)

    def _layout(self, options: Options, ring: int, random: Random) -> Layout:
        count = random.choice([2, 3])
        count = options.volumes or count
        owners = {1: ("p1", "s1"), 2: ("p2", "s2"), 3: random.choice([("p1", "s2"), ("p2", "s1")])}
        blocks = random.choice([16, 64])
        size = (options.blocks or blocks) * BLOCK
        policy = Policy(
            heartbeat_s=0.2, link_timeout_s=1.0, hold_s=random.choice([2.0, 1000.0]), checkpoint_s=0.3,
            checkpoint_bytes=64 << 10, round_s=random.choice([0.01, 0.05]), round_bytes=64 << 10,
            open_backoff_s=random.choice([0.5, 1.0]), window_bytes=random.choice([64 << 10, 32 << 20]),
            pending_bytes=128 << 10, lease_s=random.choice([0.4, 0.8]), fence_never=self.story == "never",
            suspend_when_full=self.story in ("pairs", "never") and random.random() < 0.5,
        )  # fmt: skip
        mode = Random(f"{self.seed} mode").random() < 0.3
        return Layout(
            primaries={"p1": 1, "p2": 2}, intermediate=("i", 3), secondaries={"s1": 4, "s2": 5},
            volumes={v: (*owners[v], size) for v in range(1, count + 1)},
            ring_bytes=ring, secondary_ring_bytes=random.choice([ring, 1 << 20]), policy=policy,
            volumes_mode=mode if options.volumes_mode is None else options.volumes_mode,
        )  # fmt: skip

    def _processes(self) -> dict[str, Process]:
        processes: dict[str, Process] = {}
        for names, kind in (
            (self.layout.primaries, PrimaryProcess),
            (dict([self.layout.intermediate]), IntermediateProcess),
            (self.layout.secondaries, SecondaryProcess),
        ):
            for name, number in names.items():
                processes[name] = kind(self.world, self.network, self.layout, name, number)
                processes[name].watcher = self.oracle
        return processes

    # the parts by name

    def primary(self, name: str) -> PrimaryProcess:
        """A primary."""
        process = self.processes[name]
        assert isinstance(process, PrimaryProcess)
        return process

    def secondary(self, name: str) -> SecondaryProcess:
        """A secondary."""
        process = self.processes[name]
        assert isinstance(process, SecondaryProcess)
        return process

    @property
    def intermediate(self) -> IntermediateProcess:
        """The intermediate."""
        process = self.processes["i"]
        assert isinstance(process, IntermediateProcess)
        return process

    # a run

    def limits(self) -> contextlib.AbstractContextManager[None]:
        """The small limits that this group runs under."""
        return small(self.layout.ring_bytes, self.cache_bytes)

    def create(self) -> None:
        """`create` and `up`."""
        for process in self.processes.values():
            process.format()
        order = list(self.processes.values())
        self.random.shuffle(order)
        for process in order:
            process.boot()

    def begin_work(self, threads: int | None = None) -> None:
        """Hosts start to write."""
        threads = threads or self.options.threads or self.threads
        volumes = {v: self.primary(owner) for v, (owner, _, _) in self.layout.volumes.items()}
        self.hosts = Hosts(self.world, self.oracle, volumes, threads, self.max_blocks)

    def run(self) -> Result:
        """The whole run; raises Violation, or whatever the code under test raises."""
        from tests.sim.faults import Faults

        with self.limits():
            self.create()
            if self.options.steps:
                self.world.run(START_S, self._is_up)
            self.begin_work()
            faults = Faults(self)
            self._work()
            faults.stop()
            self.rest()
        result, oracle, world = self.result, self.oracle, self.world
        result.steps, result.records, result.completions = world.steps, len(oracle.records), oracle.completions
        result.supersets = self._superset.count
        result.errors, result.digests = self.hosts.errors, self.hosts.digests
        result.taken_over = oracle.taken_over_at is not None
        return result

    def _is_up(self) -> bool:
        return all(
            process.alive and process.host.role.live for name in self.layout.primaries
            for process in [self.primary(name)]
        )  # fmt: skip

    def _work(self) -> None:
        """Hosts write, and what is planned goes wrong."""
        world, options = self.world, self.options
        if options.steps and not options.until_s:
            last = world.steps + options.steps
            world.run(float("inf"), lambda: world.steps >= last)
        else:
            world.run(options.until_s or options.seconds)

    # the end: everything is healed

    @property
    def active(self) -> list[SecondaryProcess]:
        """Secondaries that have taken over."""
        found = []
        for name in self.layout.secondaries:
            process = self.secondary(name)
            if process.alive and process.host.role.phase is SecondaryPhase.ACTIVE:
                found.append(process)
        return found

    def heal(self) -> None:
        """Every link and machine works, every process runs and none is fail-stopped."""
        self.network.heal_all()
        for process in self.processes.values():
            for file in process.machine.files.values():
                file.mend()
            process.machine.clock.drift(1.0)
            process.kill_in, process.paused_until_s = 0, 0.0
            if process.alive and (self.stopped(process) or process.name in self.oracle.excused):
                process.crash("restarted by the operator")
            process.power_on()
            process.boot()
        self.oracle.excused.clear()

    @staticmethod
    def stopped(process: Process) -> bool:
        """Fail-stopped: only a new process helps."""
        if isinstance(process, PrimaryProcess):
            return process.failed
        phase = process.host.role.phase
        return phase in (OpeningPhase.FAILED, SecondaryPhase.FAILED)

    def rest(self) -> None:
        """Heal; then without a takeover all is validated and answered, and with one all sides agree."""
        self.world.say("", "everything is healed")
        self.heal()
        self.hosts.stopped = True
        self.world.run(self.world.now_s + 0.5)
        for process in self.processes.values():
            if self.random.random() < 0.15:
                process.crash()
        self.heal()
        if self.active:
            self._end_of_takeover()
        else:
            self._liveness()
        self.oracle.check_images(self.processes)

    def _liveness(self) -> None:
        world, oracle = self.world, self.oracle

        def quiet() -> bool:
            if not self.intermediate.alive or not all(p.alive for p in self.processes.values()):
                return False
            role = self.intermediate.host.role
            return bool(self.active) or (
                role.phase is OpeningPhase.SERVING
                and role.streams.validated == role.numbered == oracle.numbered
                and not self.hosts.waiting
                and role.pairing.pair is Pair.PAIR
                and role.pairing.step.value == "nothing"
                and all(self.primary(n).host.role.live for n in self.layout.primaries)
                and all(self.primary(n).host.role.why_held() == "" for n in self.layout.primaries)
                and all(self.secondary(n).host.role.applied == role.numbered for n in self.layout.secondaries)
            )

        until_s = world.now_s + HEALED_S
        while not world.run(world.now_s + 1.0, quiet) and world.now_s < until_s:
            self._resync_again()
        if not quiet():
            raise Violation(f"12, liveness: {self.picture()}")
        if self.active:
            self._end_of_takeover()
            return
        self.check_equal()

    def check_equal(self) -> None:
        """At rest in PAIR: P-VOLs and S-VOLs hold all that was numbered. Raises Violation."""
        oracle = self.oracle
        for volume, (owner, _, _) in self.layout.volumes.items():
            if self.processes[owner].machine.files[f"volume {volume}"].cache != oracle.image(volume, oracle.numbered):
                raise Violation(f"{owner}: P-VOL {volume} at rest is not image({oracle.numbered})")
        for name in self.layout.secondaries:
            for volume in self.secondary(name).volume_ids:
                found = bytes(self.processes[name].machine.files[f"volume {volume}"].cache)
                if found != oracle.image(volume, oracle.numbered):
                    raise Violation(f"{name}: S-VOL {volume} at rest is not image({oracle.numbered})")

    def _resync_again(self) -> None:
        """The operator brings a suspended pair back."""
        process = self.intermediate
        if process.alive and process.host.role.pairing.pair in (Pair.PSUS, Pair.PSUE, Pair.PFUS):
            refused = self.pair("resync")
            if "--verify" in refused:
                self.pair("verify")

    def picture(self) -> str:
        """Where everybody is."""
        parts = []
        for name, process in self.processes.items():
            if not process.alive:
                parts.append(f"{name} is down")
                continue
            role = process.host.role
            words = f"{name} {role.phase.value}"
            if isinstance(process, IntermediateProcess):
                streams = process.host.role.streams
                words += f" numbered {role.numbered} durable {role.durable_number} validated {streams.validated}"
                words += (
                    f" {[(s.node, s.ready, s.sent, s.prepared, s.asked_through) for s in streams.by_node.values()]}"
                )
                pairing = process.host.role.pairing
                words += f" {pairing.pair.name} {pairing.step.value} numbering {process.host.role.state.numbering}"
                words += f" {process.host.role.opening.reason} free {process.host.role.senders.free_bytes}"
            elif isinstance(process, SecondaryProcess):
                words += f" received {role.received} prepared {role.state.prepared} applied {role.applied}"
            elif isinstance(process, PrimaryProcess):
                words += f" acked {role.acked} unsent {len(role.queue.unsent)} sent {len(role.queue.sent)}"
                words += f" credit {role._credit_used} of {role._credit} {role.why_held()}"
            parts.append(words)
        return "; ".join(parts)

    def _end_of_takeover(self) -> None:
        """Repeat the takeover until all members are active; the old site completes nothing more."""
        oracle = self.oracle
        finished: list[Takeover] = []
        for _ in range(8):
            finished.clear()
            self.operate(self.random.choice(list(self.layout.secondaries)), finished.append)
            self.world.run(self.world.now_s + 15, lambda: bool(finished))
            if finished and finished[0].phase is TakeoverPhase.DONE:
                break
            if finished and "was not part of the takeover" in finished[0].problem:
                return  # forced without one of them: it stays behind
            if finished and self.forced and "in different epochs" in finished[0].problem:
                return  # forced at both, each without the other: split brain, and said so (rule 22)
        else:
            raise Violation(f"a takeover cannot be finished: {[each.problem for each in finished]} {self.picture()}")
        numbers = {process.host.role.state.number for process in self.active}
        if len(self.active) < len(self.layout.secondaries) or len(numbers) > 1:
            raise Violation(f"active: {[p.name for p in self.active]} at {numbers}")
        for process in self.active:
            oracle.check_active(process)
        done = oracle.completions
        self.world.run(self.world.now_s + 5)
        if oracle.completions != done:
            raise Violation("the old site completes writes, and can reach the new one")
        phase = self.intermediate.host.role.phase
        if phase is not OpeningPhase.FENCED:
            raise Violation(f"the intermediate is {phase.value} beside an active secondary site")

    # the operator

    def operate(
        self, name: str, done: Callable[[Takeover], None] | None = None, *, dry_run: bool = False, force: bool = False
    ) -> None:
        """Run `takeover` at a secondary."""

        def finished(role: Takeover) -> None:
            if role.phase is TakeoverPhase.DONE:
                self.oracle.taken_over(role, True)
            if done is not None:
                done(role)

        process = self.secondary(name)
        if process.alive and process.paused_until_s <= self.world.now_s:
            self.forced = self.forced or force
            self.world.enter(process, lambda: process.take_over(finished, dry_run=dry_run, force=force))

    def pair(self, command: str, rate_bytes: int = 0) -> str:
        """`pair split`, `pair resync [--rate]` or `pair resync --verify`; what it was refused with, or nothing."""
        process = self.intermediate
        if not process.alive or process.paused_until_s > self.world.now_s:
            return "the intermediate is away"
        refused: list[str] = []

        def run() -> None:
            pairing, now_s = process.host.role.pairing, process.machine.clock.now_s()
            try:
                if command == "split":
                    actions = pairing.split(writable=False, now_s=now_s)
                else:
                    actions = pairing.resync(verify=command == "verify", rate_bytes=rate_bytes, now_s=now_s)
            except UsageError as error:
                refused.append(f"{error} {error.hint}")
                return
            process.host.perform(actions)
            process.host.settle()

        self.world.enter(process, run)
        self.world.say("", f"pair {command}" + (f" is refused: {refused[0]}" if refused else ""))
        return refused[0] if refused else ""

    # checks

    def _check(self) -> None:
        random = self.random
        if self._superset.due():
            self._superset.check()
        if self.world.steps % 7 == 0:
            self.oracle.check_watermarks(self.processes)
        self._since_images += 1
        if self._since_images > 400:
            self._since_images = 0
            self.oracle.check_images(self.processes)
            if random.random() < 0.3:
                self.oracle.check_on_platter(self.intermediate, self.oracle.acked)
            if random.random() < 0.5:
                self.trial()

    def trial(self) -> None:
        """Invariants 3 and 4: power-cut copies of the secondaries, take over there."""
        from tests.sim.trial import trial

        self.result.trials += 1
        trial(self)
