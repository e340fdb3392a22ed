"""Named scenarios, of the pair's life mostly. Each fails when its rule is broken: see `planted_pairs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from blockrepl.formats.link import Pair
from tests.sim import scenarios_epochs, scenarios_sites
from tests.sim.group import small
from tests.sim.oracle import demand
from tests.sim.scenario import NEVER, Scenario

SMALL_RING = 128 << 10


def rolling_disaster() -> None:
    """Rule 16: p1 goes alone; what p2's hosts write after p1 has completed alone gets no number."""
    s = Scenario("never")
    s.start()
    s.quiet(1.0)  # validated and checkpointed: nothing of it needs a bit
    s.group.network.cut("p1", "i")
    alone = s.write(1, 5)
    s.until(lambda: bool(alone.answer), "p1 alone")
    s.given(s.group.primary("p1").host.role.state.alone, "p1 completed alone")
    s.written(1, 40)  # to a block whose bit nobody had a reason to set
    dependent = s.write(2, 5)
    s.until(lambda: bool(dependent.answer), "p2 alone")
    demand(not dependent.write.number, "16: what depends on a write taken alone was numbered")
    s.burn()
    s.take_over("s1")
    demand(not s.holds("s1", 1, alone.write), "s1 has what was never numbered")
    demand(not s.holds("s2", 2, dependent.write), "s2 has what depends on it")


def power_cut_while_split() -> None:
    """Rules 17 and 18: what the journal gave up while split is in durable bits; so is what it still holds."""
    s = Scenario(ring_bytes=SMALL_RING)
    s.start()
    s.full_split()
    s.quiet(1.0)
    s.written(1, 56)  # in the journal only, in a block that no bit speaks of
    s.given(s.pairing.marked < s.group.intermediate.host.role.numbered, "the newest is not in the bits")
    intermediate = s.group.intermediate
    intermediate.cut_power()
    s.quiet()
    intermediate.power_on()
    intermediate.boot()
    s.until_joined()
    s.given(s.pairing.marked < s.group.intermediate.host.role.numbered, "it is not in the bits yet")
    s.pair("resync")
    s.until_equal()


def takeover_in_mid_resync() -> None:
    """Rule 20: no END yet: both secondaries go back to the number that they were split at."""
    s = Scenario(ring_bytes=SMALL_RING)
    s.start()
    s.full_split()
    back = s.pairing.suspended_at
    s.stalled_copy()
    s.burn()
    number = s.take_over("s1").report.number
    demand(number == back, f"8: went to {number}, split at {back}")


def secondary_killed_in_mid_resync() -> None:
    """Rule 20: the START is stored before anything above it is applied: killed, s1 knows its way back."""
    s = Scenario(ring_bytes=SMALL_RING)
    s.start()
    s.full_split()
    back = s.pairing.suspended_at
    secondary = s.group.secondary("s1")
    role = secondary.host.role
    role.policy = replace(role.policy, checkpoint_s=NEVER)  # else what START should have stored is stored by chance
    s.stalled_copy()
    s.burn()
    secondary.crash()
    secondary.boot()
    s.quiet(0.1)
    number = s.take_over("s2").report.number
    demand(number == back, f"8: went to {number}, split at {back}")


def takeover_with_an_end_that_is_not_validated() -> None:
    """Rule 20: s1 holds END, s2 does not: both go back."""
    s = Scenario(ring_bytes=SMALL_RING)
    s.start()
    s.full_split()
    back = s.pairing.suspended_at
    s.stalled_copy(rate_bytes=8 << 10)
    s.until_said("COPIED")
    s.group.network.cut("i", "s2")
    s.until(lambda: bool(s.pairing._owner.state.end), "the END is numbered")
    end = s.pairing._owner.state.end
    s.until(lambda: s.group.secondary("s1").host.role.state.prepared >= end, "s1 has prepared END")
    s.quiet(0.3)
    s.given(s.group.oracle.validate_sent < end, "nobody was told that END is valid")
    s.burn()
    number = s.take_over("s2").report.number
    demand(number == back, f"8: went to {number}, split at {back}")


def end_validated_and_one_secondary_dies() -> None:
    """Rule 20: s1 was told that END is valid, s2 died before it was: both go forward."""
    s = Scenario(ring_bytes=SMALL_RING)
    s.start()
    s.full_split()
    s.pair("resync")
    s.until(lambda: bool(s.pairing._owner.state.end), "the END is numbered")
    end = s.pairing._owner.state.end
    s.until(lambda: s.group.oracle.validate_sent >= end, "END is valid")
    s.group.secondary("s2").crash()
    s.until(lambda: s.group.secondary("s1").host.role.validated >= end, "s1 knows")
    s.burn()
    s.group.secondary("s2").boot()
    number = s.take_over("s1").report.number
    demand(number >= end, f"8: went to {number}, END {end} was validated")


def full_journal() -> None:
    """Rule 18: s2 is away, the journal fills up: PFUS, hosts go on; s2 comes back, the pair too, nobody typing."""
    s = Scenario(ring_bytes=SMALL_RING, suspend_when_full=True)
    s.start()
    s.group.network.cut("i", "s2")
    for block in range(40):
        s.written(1, block, 4)
        s.written(2, block, 4)
    s.until_pair(Pair.PFUS)
    s.written(2, 50)
    s.group.network.heal_all()
    s.until_equal()


def primary_killed_in_mid_copy() -> None:
    """Rule 17: p1 dies when it is told to copy, and then while it copies: it goes on, and nothing is forgotten."""
    s = Scenario(ring_bytes=SMALL_RING)
    s.start()
    s.full_split()
    primary = s.group.primary("p1")
    s.pair("resync")
    for words in ("i → p1  RESYNC", "copy of"):
        s.until_said(words)
        primary.cut_power()
        s.quiet(0.05)
        primary.power_on()
        primary.boot()
    s.until_equal()


def alone_and_killed() -> None:
    """Rules 7 and 17: a primary that has completed alone dies: it does not replay, and its bits and PSUE are there."""
    s = Scenario("never", checkpoint_s=NEVER)
    s.start()
    s.written(1, 5)
    s.group.network.cut("p1", "i")
    alone = s.write(1, 5)
    s.until(lambda: bool(alone.answer), "p1 alone")
    primary = s.group.primary("p1")
    s.given(primary.host.role.state.alone, "p1 completed alone")
    primary.crash()
    s.group.network.heal_all()
    primary.boot()
    s.until(lambda: primary.host.role.serving and bool(primary.host.role.link), "p1 serves")
    s.quiet(1.0)
    demand(s.holds("p1", 1, alone.write), "7: what was completed alone was overwritten")
    s.pair("resync")
    s.until_equal()
    demand(s.holds("s1", 1, alone.write), "21: what was completed alone is not at s1")


def solo_writes_enter_at_the_end() -> None:
    """Rule 21: a takeover before END is one without what was written alone; after it, with all of it."""
    for takeover_before_end in (False, True):
        s = Scenario("never")
        s.start()
        s.group.network.cut("p1", "i")
        alone = [s.write(1, block) for block in (0, 17, 40)]
        s.until(lambda alone=alone: all(each.answer for each in alone), "p1 alone")  # type: ignore[misc]
        s.until(lambda s=s: not s.pairing._owner.state.numbering, "PSUE")  # type: ignore[misc]
        s.group.network.heal_all()
        s.until_joined()
        if takeover_before_end:
            s.stalled_copy()
            s.burn()
            s.take_over("s1")
            demand(not any(s.holds("s1", 1, each.write) for each in alone), "21: before END, and they are there")
        else:
            s.pair("resync")
            s.until_equal()
            s.burn()
            s.take_over("s1")
            demand(all(s.holds("s1", 1, each.write) for each in alone), "21: after END, and they are not there")


def writes_while_copying() -> None:
    """Rule 19: a block is copied while hosts write it: the newer one wins everywhere."""
    s = Scenario(ring_bytes=SMALL_RING)
    s.start()
    s.full_split()
    s.pair("resync")
    s.until_said("i → p1  RESYNC")
    for count in range(60):
        s.write(1, count % 48)
        s.write(2, count % 48)
        s.quiet(0.0004)
    s.until_equal()


def power_cut_behind_a_checkpoint() -> None:
    """Rule 4: a write is stored while the P-VOL is synced for a checkpoint: that does not speak for it."""
    s = Scenario()
    s.start()
    primary = s.group.primary("p1")
    primary.disk.slow_until_s = s.world.now_s + 5
    role = primary.host.role
    s.written(1, 5)
    s.until(lambda: role.checkpoints._under_way, "a checkpoint")
    s.quiet(0.02)
    newer = s.written(1, 6)
    s.given(role.checkpoints._under_way, "it was stored in the meantime")
    s.until(lambda: not role.checkpoints._under_way, "its end")
    primary.cut_power()
    s.quiet(0.1)
    s.given(not s.holds("p1", 1, newer.write), "the power took it")
    primary.power_on()
    primary.boot()
    s.until(lambda: primary.host.role.serving, "p1 serves")
    demand(s.holds("p1", 1, newer.write), "2: a write is gone that was completed")
    s.until_equal()


SCENARIOS: list[Callable[[], None]] = [
    rolling_disaster, power_cut_while_split, takeover_in_mid_resync, secondary_killed_in_mid_resync,
    takeover_with_an_end_that_is_not_validated, end_validated_and_one_secondary_dies, full_journal,
    primary_killed_in_mid_copy, alone_and_killed, solo_writes_enter_at_the_end, writes_while_copying,
    power_cut_behind_a_checkpoint, *scenarios_epochs.SCENARIOS,
    *scenarios_sites.SCENARIOS,
]  # fmt: skip


def play(scenario: Callable[[], None]) -> None:
    """Under the small limits of the simulator. Raises what broke, or Unfit."""
    with small(SMALL_RING, 64 << 10):
        scenario()
