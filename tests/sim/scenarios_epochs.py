"""Named scenarios of torn tails, of takeovers and of epochs; see `scenarios.py`."""

from __future__ import annotations

from collections.abc import Callable

from blockrepl.formats.journal import RING_OFFSET
from blockrepl.formats.link import Pair
from blockrepl.replication.opening import Phase as OpeningPhase
from blockrepl.replication.takeover import Phase as TakeoverPhase
from blockrepl.replication.takeover import Takeover
from tests.sim.oracle import demand
from tests.sim.scenario import Scenario

SMALL_RING = 128 << 10
FRAME = 4096  # of a record of one block


def torn_tail() -> None:
    """Rule 9: power takes the first of two records and leaves the second, which must not come back behind a third."""
    s = Scenario()
    s.start()
    s.quiet(1.0)
    intermediate, primary = s.group.intermediate, s.group.primary("p1")
    intermediate.host.journal.inline_bytes = -1
    intermediate.disk.slow_until_s = s.world.now_s + 5
    s.disk_takes_all_that_waits()
    s.write(2, 5)
    s.quiet(0.01)
    lost = [s.write(1, 5), s.write(1, 6)]  # while the disk is busy with that one
    file = intermediate.machine.files["journal"]
    s.until(lambda: [len(data) for _, _, data in file.pending] == [FRAME, FRAME], "both in the page cache")
    _, offset, data = file.pending[1]
    file.platter[offset : offset + FRAME] = data
    for process in (intermediate, primary):
        process.cut_power()
    file.cache[:] = file.platter
    s.quiet(0.2)
    for process in (intermediate, primary):
        process.power_on()
        process.boot()
    s.until_joined()
    s.until(lambda: primary.host.role.serving, "p1 serves")
    journal = intermediate.host.journal.journal
    s.given(RING_OFFSET + journal.tail % journal.ring_bytes == offset - FRAME, "the tail was cut before the first")
    s.written(2, 7)
    intermediate.crash()
    intermediate.boot()
    s.until_equal()
    demand(not any(s.holds("s1", 1, each.write) for each in lost), "9: a record that was cut came back")


def late_records_after_a_promise() -> None:
    """Rule 23: s1 has promised, and what the old epoch sends comes after that: nothing of it may be prepared."""
    s = Scenario()
    s.start()
    network, finished = s.group.network, list[Takeover]()
    network.cut("i", "s1", both=False)
    s.written(1, 5)
    s.written(2, 5)
    s.until(lambda: s.group.oracle.prepared["s2"] == s.group.oracle.numbered, "s2 has prepared all")
    s.group.operate("s1", finished.append)  # it cannot reach the intermediate
    s.until_said("s1 → s2  PROMISE")
    s.group.secondary("s2").paused_until_s = s.world.now_s + 0.3
    s.until_said("s1 → s1  PROMISED")
    network.heal("i", "s1", both=False)
    s.quiet(0.05)
    network.cut("i", "s1", both=False)  # an answer to what s1 ought not to say stays away
    s.until(lambda: bool(finished), "the end of the takeover")
    demand(finished[0].phase is TakeoverPhase.DONE, f"23: the takeover fails: {finished[0].problem}")


def takeover_interrupted_behind_a_rollback() -> None:
    """Rule 23: s1 had prepared what a takeover discarded; its node dies, production goes on: s1 is asked again."""
    s = Scenario()
    s.start()
    network, finished = s.group.network, list[Takeover]()
    network.cut("i", "s2")
    s.written(2, 5)
    s.written(1, 5)
    s.until(lambda: s.group.oracle.prepared["s1"] == s.group.oracle.numbered, "s1 has prepared all")
    s.group.operate("s2", finished.append)
    s.until_said("s1 → s2  STORED")
    opener = s.group.secondary("s2")
    opener.crash()
    opener.boot()
    network.heal("i", "s2")
    s.given(s.group.secondary("s1").host.role.held < s.group.oracle.numbered, "s1 has discarded it")
    intermediate = s.group.intermediate.host.role
    s.until(lambda: intermediate.phase is OpeningPhase.SERVING and intermediate.streams.all_ready, "production")
    network.cut("i", "s1", both=False)
    s.quiet(0.3)
    network.heal("i", "s1", both=False)
    s.until_equal()


def split_before_the_start_of_a_verify_arrived() -> None:
    """Rule 20: a verify is split before s2 has what goes before its START: the next one goes back to less, for all."""
    for takes_over in (False, True):
        s = Scenario(round_s=3.0)
        s.start()
        s.written(2, 4)
        s.quiet(3.2)
        s.written(2, 5)  # to be sent with the next round
        s.pair("verify")
        s.until_said("s2 → i  REJOINED")
        network = s.group.network
        network.cut("i", "s2", both=False)
        s.until_said("RESYNC")
        s.given(s.group.secondary("s2").host.role.held < s.pairing.suspended_at, "s2 lacks what goes before START")
        s.pair("split")
        for connection in network.connections:
            if {process.name for process in connection.processes} == {"i", "s2"}:
                connection.drop()
        network.heal("i", "s2", both=False)
        s.until_pair(Pair.PSUS)
        s.until_joined()
        s.written(1, 6)
        if takes_over:
            s.pair("resync", 1)
            s.until_copying()
            back = s.pairing._owner.state.at
            s.given(not s.pairing._owner.state.end, "no END yet")
            s.burn()
            number = s.take_over("s1").report.number
            demand(number == back, f"8: went to {number}, the resync goes back to {back}")
        else:
            s.pair("resync")
            s.until_equal()


def split_right_behind_an_end() -> None:
    """Rule 18: a split is asked for while END is under way: s2, whose disk is slow, splits when its copy has ended."""
    for rejoins_at_once in (False, True):
        _split_behind_an_end(rejoins_at_once=rejoins_at_once)


def _split_behind_an_end(*, rejoins_at_once: bool) -> None:
    s = Scenario(ring_bytes=SMALL_RING)
    s.start()
    s.full_split()
    s.pair("resync")
    s.until(lambda: bool(s.pairing._owner.state.end), "the END is numbered")
    end, prepared = s.pairing._owner.state.end, s.group.oracle.prepared
    s.until(lambda: min(prepared.values()) >= end, "both say that they hold it")
    s.given(s.group.oracle.validate_sent < end, "that has not arrived")
    s.group.secondary("s2").disk.slow_until_s = s.world.now_s + 5
    s.pair("split")
    s.until_pair(Pair.PSUS)
    states = [s.group.secondary(name).host.role.state for name in ("s1", "s2")]
    if rejoins_at_once:
        s.until_said("i → s2  SPLIT")
        s.given(bool(states[1].copying), "s2 still ends its copy")
    else:
        s.until(lambda: all(state.split for state in states), "the split of both")
        demand(not any(state.copying for state in states), "18: split, and copying")
    s.pair("resync")
    s.until_equal()


SCENARIOS: list[Callable[[], None]] = [
    torn_tail, late_records_after_a_promise, takeover_interrupted_behind_a_rollback,
    split_before_the_start_of_a_verify_arrived, split_right_behind_an_end,
]  # fmt: skip
