"""Recovery against a model: random appends, syncs, trims, truncations and power cuts on a disk that tears writes."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blockrepl.errors import DamagedError
from blockrepl.formats.journal import FRAME_HEADER_BYTES, RING_OFFSET
from blockrepl.storage.recovery import recover
from tests.storage.journals import IDENTITY, Rig, body_of, good_body

SEEDS = st.integers(0, 2**32 - 1)
Frame = tuple[int, int, int]  # position, number, CRC of the body (0 for a note)


class PowerCuts(RuleBasedStateMachine):
    """The model: which frames must be there, which may be."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.frames: list[Frame] = []  # appended and neither cut nor truncated, from the first on
        self.durable = 0  # the disk was synced when the tail stood here
        self.number = 0
        self.state = b""
        self.saving: bytes | None = None
        self.truncating: list[Frame] | None = None  # what remains when the truncation took place
        self.saves = 0

    @precondition(lambda self: self.truncating is None)
    @rule(
        size=st.sampled_from([0, 4032, 4033, 20000, 100000]),
        salt=st.sampled_from([0, 0, 0, 1]),
        times=st.integers(1, 4),
    )
    def append(self, size: int, salt: int, times: int) -> None:
        for _ in range(times):
            if not self.rig.journal.fits(size):
                return
            self.number += 1
            position = self.rig.append(self.number, size, salt=salt)
            self.frames.append((position, self.number, crc32c(body_of(self.number, size, salt))))

    @precondition(lambda self: self.truncating is None)
    @rule()
    def note(self) -> None:
        if self.rig.journal.fits(0):
            self.rig.note(self.number)
            self.frames.append((self.rig.journal.tail - 4096, self.number, 0))

    @rule()
    def sync(self) -> None:
        self.rig.sync()
        self.durable = self.rig.journal.tail

    @rule()
    def sync_and_die_before_it_is_known(self) -> None:
        self.rig.disk.sync()
        self.durable = self.rig.journal.tail

    @precondition(lambda self: self.truncating is None)
    @rule(share=st.floats(0, 1))
    def trim(self, share: float) -> None:
        journal = self.rig.journal
        starts = [ref.position for ref in journal.frames() if ref.position <= journal.durable] + [journal.durable]
        if starts:
            journal.trim(starts[round(share * (len(starts) - 1))])

    @precondition(lambda self: self.saving is None)
    @rule()
    def begin_save(self) -> None:
        self.saves += 1
        self.saving = b"state %d" % self.saves
        self.rig.begin_save(self.saving)

    @precondition(lambda self: self.saving is None)
    @rule(share=st.floats(0, 1))
    def begin_truncation(self, share: float) -> None:
        journal = self.rig.journal
        starts = [ref.position for ref in journal.frames() if ref.position <= journal.durable] + [journal.durable]
        position = starts[round(share * (len(starts) - 1))]
        journal.truncate(position)
        self.truncating = [each for each in self.frames if each[0] < position]
        self.begin_save()

    @precondition(lambda self: self.saving is not None)
    @rule()
    def end_save(self) -> None:
        assert self.saving is not None
        self.rig.end_save()
        self.state, self.saving = self.saving, None
        if self.truncating is not None:
            self.frames, self.truncating = self.truncating, None
            self.number = max((each[1] for each in self.frames), default=self.number)
        self.durable = self.rig.journal.tail

    @rule(seed=SEEDS, unit=st.sampled_from([512, 4096]), kill_only=st.booleans(), again=st.integers(0, 2))
    def crash(self, seed: int, unit: int, kill_only: bool, again: int) -> None:
        random = Random(seed)
        if not kill_only:
            self.rig.disk.power_cut(random, unit)
        for _ in range(again):  # recovery itself is cut short
            recovered = self.rig.examine()
            self.rig.perform(list(recovered.writes))
            self.rig.disk.power_cut(random, unit)
        recovered = self.rig.restart()
        journal = self.rig.journal
        assert recovered.state in (self.state, self.saving)
        found = [(ref.position, ref.first, self._crc(ref.body_offset, ref.body_bytes)) for ref in journal.frames()]
        saved = recovered.state == self.saving
        history = self.truncating if self.truncating is not None and saved else self.frames
        below = [each for each in history if each[0] < journal.head]
        expected, lost = history[len(below) :][: len(found)], history[len(below) + len(found) :]
        assert found == expected
        assert all(position >= self.durable for position, _, _ in lost)
        self.frames = below + found
        self.state, self.saving, self.truncating = recovered.state, None, None
        self.durable = journal.tail
        self.number = max((each[1] for each in self.frames), default=0)

    def _crc(self, offset: int, length: int) -> int:
        return crc32c(self.rig.disk.read(offset, length)) if length else 0

    @invariant()
    def watermarks_are_in_order(self) -> None:
        journal = self.rig.journal
        assert journal.head <= journal.durable <= journal.tail <= journal.head + journal.ring_bytes
        assert journal.unsynced_bytes <= journal.unsynced_limit_bytes
        assert 0 <= journal.free_bytes <= journal.ring_bytes


PowerCuts.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPowerCuts = PowerCuts.TestCase


@pytest.mark.parametrize("seed", range(12))
def test_many_laps_of_random_work_and_power_cuts(seed: int) -> None:
    """The same rules for a long time, with room made often enough that the ring goes round."""
    random = Random(seed)
    model = PowerCuts()
    laps = 0
    for _ in range(600):
        laps = max(laps, model.rig.journal.tail // model.rig.journal.ring_bytes)
        step = random.choice("aaaaaaaassssttbbeecnuX")
        if step == "a" and model.truncating is None:
            model.append(
                random.choice([0, 100, 4032, 4033, 50000, 150000]), random.randrange(2), random.randrange(1, 6)
            )
        elif step == "n" and model.truncating is None:
            model.note()
        elif step == "s":
            model.sync()
        elif step == "u":
            model.sync_and_die_before_it_is_known()
        elif step == "t" and model.truncating is None:
            model.trim(random.choice([0.3, 1, 1, 1]))
        elif step == "b" and model.saving is None:
            model.begin_save()
        elif step == "e" and model.saving is not None:
            model.end_save()
        elif step == "c":
            model.crash(random.getrandbits(32), random.choice([512, 4096]), random.random() < 0.2, random.randrange(3))
        elif step == "X" and model.saving is None and random.random() < 0.3:
            model.begin_truncation(random.random())
        model.watermarks_are_in_order()
    assert laps >= 3, "the walk never went round the ring"


def test_no_durable_byte_changes_unseen() -> None:
    """Flip bits everywhere below a durable position that somebody speaks for: all but padding is caught."""
    rig = Rig()
    for number in range(1, 40):
        rig.append(number, [10, 4032, 9000][number % 3])
        if not number % 4:
            rig.sync()
    rig.sync()
    rig.append(40)
    witness = rig.journal.durable
    untouched = [ref.first for ref in rig.examine().journal.frames()]
    spoken_for = [
        (ref.position % rig.journal.ring_bytes + RING_OFFSET, FRAME_HEADER_BYTES + ref.body_bytes)
        for ref in rig.journal.frames()
        if ref.position < witness
    ]
    random = Random(1)
    for start, length in spoken_for:
        at = {0, 63, 64, length - 1} | {random.randrange(length) for _ in range(12)}
        for offset in [start + each for each in at if each < length]:
            rig.disk.cache[offset] ^= 1 << random.randrange(8)
            with pytest.raises(DamagedError):
                recover(rig.disk.read, good_body, IDENTITY)
            rig.disk.cache[offset] = rig.disk.platter[offset]
    assert [ref.first for ref in rig.examine().journal.frames()] == untouched
