"""An operator's random walk: at a real group, by the command line only, in any order, while hosts write all the time.

Commands may be refused; then they must say so properly. After some steps the group is healed (healing.py), and nothing
acknowledged may be missing on either side. What a takeover gives up is compared with what it says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress

from scripts.torturelib.errors import BrokenPromiseError
from scripts.torturelib.group import INTERMEDIATE, NAMES, NODES, PATIENCE_S
from scripts.torturelib.healing import Healing, explain
from scripts.torturelib.hosts import AREA_BLOCKS
from scripts.torturelib.life import Life, Round
from scripts.torturelib.operator import Operator
from scripts.torturelib.stamps import BLOCK_BYTES
from scripts.torturelib.typed import TypedGroup
from tests.demo.nbd_client import NbdVolume

SPLIT_AT_BYTES = 2 * AREA_BLOCKS * BLOCK_BYTES  # where a host writes to a split S-VOL: beyond all others
LOOKS = ("explain", "status", "status --json", "ls", "bitmap --json", "journal --limit 5", "verify", "doctor")
TYPED_TWICE = ("pair split", "pair split --rw", "pair resync", "pair delete", "pair create", "takeover --json",
               "pair resync --swap", "replace --node i1")  # fmt: skip
MODE = {True: 'mode = "volumes"', False: 'mode = "journal"'}


class Walk(Operator):
    """Round after round with one group. `play` is a round."""

    def __init__(self, life: Life, group: TypedGroup, *, volumes_mode: bool) -> None:
        super().__init__(life, group)
        self._volumes_mode = volumes_mode
        self._lost = ""  # a node whose disk is gone
        self._markers = 0
        self._steps: list[tuple[float, Callable[[], None]]] = [
            (4, self._kill), (2, self._start), (1, self._stop), (3, self._split), (4, self._resync), (3, self._swap),
            (1, self._delete), (2, self._create), (2, self._exclude), (3, self._disaster), (2, self._lose_other),
            (1, self._lose_source), (1, self._change_mode), (2, self._twice), (1, self._wait), (1, self._look),
            (2, self._cut), (1, self._mark),
        ]  # fmt: skip

    def begin(self) -> Round:
        """The first round: hosts come, and all they wrote is on both sides."""
        self._round = round_ = self._life.now = Round("walk: begin")
        with self._life.load(round_):
            pass
        self._life.at_rest(round_)
        return round_

    def play(self, steps: int) -> Round:
        """Some steps, then back to PAIR; everything acknowledged must be there, on both sides."""
        self._round = round_ = self._life.now = Round("walk")
        round_.notes["fence"] = self._group.definition.group.fence
        weights, ways = zip(*self._steps, strict=True)
        try:
            self._hosts_begin()
            for _ in range(steps):
                self._random.choices(ways, weights)[0]()
                time.sleep(self._random.choice((0.0, 0.2, 1.0, 2.0)))
            self._note(f"heal{self._lost and f', {self._lost} is lost'}")
            Healing(self._group, self._lost).heal()
            self._lost = ""
        finally:
            self._hosts.close()
        Healing(self._group).heal()  # on a busy machine a primary may have gone on alone once more
        round_.notes["typed"] = len(self._group.answers)
        round_.notes["refused"] = sum(1 for answer in self._group.answers if answer.code)
        self._group.answers.clear()
        self._life.at_rest(round_)
        return round_

    # steps

    def _some(self) -> list[str]:
        running = [node for node in NODES if node in self._group.running]
        count = self._random.choice((1, 1, 1, 2, 2, len(NODES)))
        return sorted(self._random.sample(running, min(count, len(running))))

    def _kill(self) -> None:
        nodes = self._some()
        self._note(f"kill -9 {' '.join(nodes)}")
        self._group.kill(nodes)
        time.sleep(self._random.uniform(0.0, 2.5))
        if nodes and self._random.random() < 0.6:
            self._group.start(*nodes, wait=False)

    def _start(self) -> None:
        """What is down, but for a node without a disk: that is refused."""
        down = [node for node in NODES if node not in self._group.running and node != self._lost]
        self._note(f"up {' '.join(down)}")
        if down:
            self._group.start(*down, wait=False)

    def _stop(self) -> None:
        node = self._random.choice(NODES)
        self._type(f"down --node {node}")

    def _split(self) -> None:
        if not self._type(self._random.choice(("pair split", "pair split --rw"))).ok:
            return
        time.sleep(self._random.uniform(0.0, 1.5))
        for name in NAMES:  # refused where it is not writable
            with suppress(OSError):
                volume = NbdVolume(self._group.nbd_uri(name, secondary=not self._group.direction), 10.0)
                volume.write(
                    SPLIT_AT_BYTES + BLOCK_BYTES * self._random.randrange(64), b"split" * 819 + b"!", durable=True
                )
                volume.close()

    def _resync(self) -> None:
        self._type(
            self._random.choice(("pair resync", "pair resync", "pair resync --verify", "pair resync --rate 5MiB"))
        )

    def _swap(self) -> None:
        line = "pair resync --swap" + self._random.choice(("", "", " --verify", " --dry-run"))
        self._type(line)
        self._learn(line, may_lose=False)

    def _delete(self) -> None:
        self._type("pair delete")

    def _create(self) -> None:
        self._type(self._random.choice(("pair create", "pair create --rate 20MiB")))

    def _exclude(self) -> None:
        node = self._random.choice(self._group.sources)
        if self._random.random() < 0.7:
            self._note(f"kill -9 {node}")
            self._group.kill([node])
            time.sleep(2.0)
        self._type(f"node exclude {node}")
        time.sleep(self._random.uniform(0.0, 2.0))
        self._type(f"node include {node}")

    def _disaster(self) -> None:
        """The site is lost, with the intermediate or without, or nothing is and a takeover is typed all the same."""
        group = self._group
        if self._lost in group.targets:
            return
        lost = self._random.choice(((), group.sources, group.sources, (*group.sources, INTERMEDIATE)))
        self._note(f"disaster: kill -9 {' '.join(lost) or 'nobody'}")
        group.kill(lost)
        if self._random.random() < 0.3:
            self._type("takeover --dry-run")
        self._take_over(insist=False)

    def _lose_other(self) -> None:
        """The disk of the intermediate or of a target; it is replaced at once, or when the group is healed."""
        if self._lost:
            return
        group = self._group
        self._lost = self._random.choice((INTERMEDIATE, INTERMEDIATE, *group.targets))
        self._note(f"the disk of {self._lost} is lost")
        group.lose(self._lost)
        if self._random.random() < 0.3:
            self._type(f"up --node {self._lost}")
        if self._random.random() < 0.6:
            self._start()
            if self._type(f"replace --node {self._lost}").ok:
                self._lost = ""

    def _lose_source(self) -> None:
        """Nothing but a takeover helps."""
        group = self._group
        if self._lost or explain(group)["pair"] != "PAIR" or not all(node in group.running for node in group.targets):
            return
        self._lost = self._random.choice(group.sources)
        self._note(f"the disk of {self._lost} is lost, which is a source")
        group.lose(self._lost)
        if self._random.random() < 0.3:
            self._type(f"replace --node {self._lost}")
        self._take_over(insist=True)

    def _change_mode(self) -> None:
        group = self._group
        if self._lost or INTERMEDIATE not in group.running:
            return
        was = self._volumes_mode
        self._type(f"down --node {INTERMEDIATE}")
        self._set_mode(not was)
        if not self._type(f"up --node {INTERMEDIATE} --no-wait").ok or not self._stays_up():
            self._set_mode(was)  # in mid-resync it is refused
            group.start(INTERMEDIATE, wait=False)
        elif self._random.random() < 0.8:
            self._type("pair resync --verify")

    def _set_mode(self, volumes: bool) -> None:
        self._note(f"{MODE[volumes]} is written")
        self._group.change(MODE[not volumes], MODE[volumes])
        self._volumes_mode = volumes
        if volumes:
            self._type(f"create --node {INTERMEDIATE}")

    def _stays_up(self) -> bool:
        group = self._group
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            if group.gone_by_itself(INTERMEDIATE):
                return False
            if group.status(INTERMEDIATE):
                return True
            time.sleep(0.1)
        raise BrokenPromiseError("the intermediate neither answers nor ends")

    def _twice(self) -> None:
        """The same command typed at two screens."""
        line = self._random.choice(TYPED_TWICE)
        if "takeover" in line and self._lost in self._group.targets:
            return
        self._note(f"twice: {line}")
        typed = [self._group.begin(*line.split())]
        time.sleep(self._random.choice((0.0, 0.0, 0.3)))
        typed.append(self._group.begin(*line.split()))
        answers = [self._group.end(each) for each in typed]
        may_lose = "takeover" in line
        for answer in answers:
            if may_lose and answer.ok:
                may_lose = not json.loads(answer.out)["lossless"]
        if line.startswith("replace") and any(answer.ok for answer in answers) and self._lost == INTERMEDIATE:
            self._lost = ""
        self._learn(line, may_lose=may_lose)

    def _wait(self) -> None:
        self._type(f"pair wait -s {self._random.choice(('PAIR', 'PSUS,PSUE', 'COPY,PAIR'))} -t 5")

    def _look(self) -> None:
        self._type(self._random.choice(LOOKS))

    def _cut(self) -> None:
        """Under fence never that primary goes on alone."""
        node = self._random.choice(self._group.sources)
        for pair in ((node, INTERMEDIATE), (INTERMEDIATE, node)):
            self._group.network.cut(*pair)
        seconds = self._random.uniform(0.5, 9.0)
        self._note(f"{node} is cut off from the intermediate for {seconds:.1f} s")
        time.sleep(seconds)
        early, late = self._random.choice(((True, False), (False, True), (False, False)))
        if early:
            self._swap()
        self._group.network.heal()
        if late:
            self._swap()

    def _mark(self) -> None:
        self._markers += 1
        if self._type(f"marker put walk{self._markers}").ok:
            self._type(f"marker wait walk{self._markers} -t 10")
