"""A whole group without chance: a scenario says what happens, and when; the oracle watches as ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from blockrepl.block import Op, WriteBatch
from blockrepl.formats.link import Pair
from blockrepl.replication.opening import Phase as OpeningPhase
from blockrepl.replication.takeover import Phase as TakeoverPhase
from blockrepl.replication.takeover import Takeover
from tests.sim.group import Group, Options
from tests.sim.process import BLOCK, Process
from tests.sim.transcript import Steady
from tests.sim.words import sentences
from tests.sim.world import Violation
from tests.sim.write import Write

NEVER = 1e9


class Unfit(Exception):  # noqa: N818
    """The scenario did not come to what it is about: it proves nothing."""


@dataclass
class Asked:
    """A write of a host, and what it was told."""

    write: Write
    answer: str = ""  # "well" or "failed"


class Scenario:
    """Volume 1 goes from p1 to s1, volume 2 from p2 to s2; every delay is a middling one; power cuts keep nothing."""

    def __init__(self, story: str = "pairs", *, ring_bytes: int = 1 << 20, **policy: Any) -> None:
        """``story`` "never" is the fence level; ``policy``: fields of `Policy`."""
        self.group = Group(0, Options(story=story, volumes=2, blocks=64, ring_bytes=ring_bytes, strict=True), Steady())
        layout = self.group.layout
        policy = {"hold_s": NEVER, "suspend_when_full": False} | policy
        layout.policy = replace(layout.policy, **policy)
        self.world = self.group.world
        self.said: list[str] = []
        self._ids = 0
        self.world.on_message = self._message

    def _message(self, process: Process, peer: str, data: bytes) -> None:
        self.said += sentences(process.name, peer, data)

    # time

    def quiet(self, seconds: float = 0.5) -> None:
        """Let them go on."""
        self.world.run(self.world.now_s + seconds)

    def disk_takes_all_that_waits(self) -> None:
        """What is queued at a disk is written before the next sync; usually it is one operation at a time."""
        self.world.random.randint = lambda a, b: b  # type: ignore[method-assign]

    def until(self, done: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        """Raises Violation when it does not come."""
        if not self.world.run(self.world.now_s + seconds, done):
            raise Violation(f"12: {what} does not come: {self.group.picture()}")

    def until_said(self, words: str, seconds: float = 20.0) -> None:
        """A message goes out: it has not arrived yet."""
        at = len(self.said)
        self.until(lambda: any(words in line for line in self.said[at:]), words, seconds)

    @staticmethod
    def given(truth: bool, what: str) -> None:
        """Raises Unfit."""
        if not truth:
            raise Unfit(what)

    # the group

    @property
    def pairing(self) -> Any:
        """The pair, at the intermediate."""
        return self.group.intermediate.host.role.pairing

    def start(self) -> None:
        """`create` and `up`; each block of both volumes is written once."""
        self.group.create()
        self.until(lambda: self.group.intermediate.host.role.phase is OpeningPhase.SERVING, "production")
        self.write_all()
        self.until_equal()

    def write_all(self) -> None:
        """Every block of both volumes, 16 at a time, answered before the next."""
        for block in range(0, 64, 16):
            for volume in (1, 2):
                self.written(volume, block, 16)

    def write(self, volume: int, block: int, count: int = 1) -> Asked:
        """A host writes something new."""
        group = self.group
        process = group.primary(group.layout.volumes[volume][0])
        self._ids += 1
        payload = b"%015d " % self._ids * (count * BLOCK // 16)
        batch = WriteBatch(lambda _: None)
        for column, value in (
            (batch.ops, Op.WRITE), (batch.offsets, block * BLOCK), (batch.lengths, count * BLOCK), (batch.flags, 0),
            (batch.cookies, self._ids),
        ):  # fmt: skip
            column.append(int(value))
        batch.payloads.append(memoryview(payload))
        batch.size_bytes = len(payload)
        ours = Write(
            volume, list(batch.ops), list(batch.offsets), list(batch.lengths), [payload], group.oracle.completed
        )
        asked = Asked(ours)
        group.oracle.host_submits(process, batch, ours)

        def done(batch: WriteBatch) -> None:
            group.oracle.submitting.pop(id(batch), None)
            asked.answer = "failed" if batch.errors else "well"
            if batch.errors is None:
                group.oracle.complete(process, ours)

        batch.done = done

        def submit() -> None:
            if process.volumes[volume].submit(batch):
                done(batch)

        group.world.enter(process, submit)
        return asked

    def written(self, volume: int, block: int, count: int = 1) -> Asked:
        """A host writes, and is answered."""
        asked = self.write(volume, block, count)
        self.until(lambda: bool(asked.answer), f"the answer to a write of volume {volume}")
        return asked

    def holds(self, name: str, volume: int, write: Write) -> bool:
        """Whether a volume has what a host wrote."""
        content = bytes(self.group.processes[name].machine.files[f"volume {volume}"].cache)
        return content[write.offsets[0] :].startswith(write.payloads[0])

    def pair(self, command: str, rate_bytes: int = 0) -> None:
        """See `Group.pair`. Raises Violation when it is refused."""
        refused = self.group.pair(command, rate_bytes)
        if refused:
            raise Violation(f"pair {command}: {refused}")

    def until_pair(self, state: Pair, seconds: float = 20.0) -> None:
        """The pair is in a state, and nothing is being done to it."""
        self.until(
            lambda: self.pairing.pair is state and self.pairing.step.value == "nothing", f"state {state.name}", seconds
        )

    def until_joined(self) -> None:
        """All are connected."""
        group = self.group
        self.until(
            lambda: group.intermediate.host.role.phase is OpeningPhase.SERVING and not self.pairing.missing(),
            "everybody",
        )

    def until_equal(self) -> None:
        """PAIR, all validated and applied, and every volume says so."""
        group = self.group

        def quiet() -> bool:
            role = group.intermediate.host.role
            return (
                role.phase is OpeningPhase.SERVING
                and self.pairing.pair is Pair.PAIR
                and self.pairing.step.value == "nothing"
                and role.streams.validated == role.numbered
                and all(group.primary(n).host.role.why_held() == "" for n in group.layout.primaries)
                and all(group.secondary(n).host.role.applied == role.numbered for n in group.layout.secondaries)
            )

        self.until(quiet, "PAIR, with all of it applied")
        group.oracle.check_images(group.processes)
        group.check_equal()

    def full_split(self) -> None:
        """PSUS, and the journal has given up records that were written since; some are in it still."""
        self.pair("split")
        self.until_pair(Pair.PSUS)
        at = self.pairing.suspended_at
        block = 0
        while not self._gave_up_after(at):
            self.given(block < 400, "the journal is never full")
            for volume in (1, 2):
                self.written(volume, block % 48)
            self.quiet(0.05)
            block += 1

    def _gave_up_after(self, at: int) -> bool:
        role = self.group.intermediate.host.role
        head = next((frame for frame in self.group.intermediate.host.journal.journal.frames() if frame.last), None)
        return head is not None and at + 1 < head.last and at < self.pairing.marked < role.numbered

    def stalled_copy(self, rate_bytes: int = 1) -> None:
        """A resync so slow that END does not come; its first copies are validated and applied."""
        self.pair("resync", rate_bytes)
        secondary = self.group.secondary("s1")
        back = self.pairing.suspended_at if self.pairing._owner.state.limited else 0

        def copied() -> bool:
            role = secondary.host.role
            number = back or role.state.copy_from
            return (
                self._copying("s1")
                and self._copying("s2")
                and self.image("s1", 1) != self.group.oracle.image(1, number)
            )

        self.until(copied, "a copy at s1")
        self.given(not self.pairing._owner.state.end, "no END yet")

    def image(self, name: str, volume: int) -> bytes:
        """What a process finds in a volume."""
        return bytes(self.group.processes[name].machine.files[f"volume {volume}"].cache)

    def until_copying(self) -> None:
        """Both secondaries have stored that they copy."""
        self.until(lambda: self._copying("s1") and self._copying("s2"), "a copy at both")

    def _copying(self, name: str) -> bool:
        return bool(self.group.secondary(name).host.role.state.copying)

    # disasters

    def burn(self) -> None:
        """The primaries and the intermediate lose power, for good."""
        for name in ("p1", "p2", "i"):
            self.group.processes[name].cut_power()

    def take_over(self, name: str) -> Takeover:
        """To its end; the volumes are checked by the oracle when they become active. Raises Violation."""
        finished: list[Takeover] = []
        self.group.operate(name, finished.append)
        self.until(lambda: bool(finished), "the end of a takeover")
        if finished[0].phase is not TakeoverPhase.DONE:
            raise Violation(f"a takeover fails: {finished[0].problem}")
        self.until(lambda: len(self.group.active) == 2, "both secondaries active", 5)
        for process in self.group.active:
            self.group.oracle.check_active(process)
        return finished[0]
