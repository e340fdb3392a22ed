"""Mutants are what they say, one at a time, and are gone afterwards; one that breaks a rule is found."""

from __future__ import annotations

from blockrepl.replication.streams import Streams
from tests.sim.mutants import Mutant, mutants_of, planted
from tests.sim.mutate import judge, measure, trials

MODULE = "blockrepl.replication.streams"


def one(function: str, what: str, before: str) -> Mutant:
    found = [each for each in mutants_of(MODULE) if each.function == function and each.what == what]
    return next(each for each in found if before in each.before)


def test_a_mutant_changes_one_function_for_a_while() -> None:
    whole = Streams.drained
    streams = Streams([4, 5], 1, 0.01, 1 << 20)
    streams.validated = 3
    assert not streams.drained(4)
    with planted(one("Streams.drained", "other comparison", "self.validated >= number")):
        assert streams.drained(0) == all(stream.validated >= 0 for stream in streams.by_node.values())
        assert not streams.drained(3)
    assert Streams.drained is whole
    assert not streams.drained(4)


def test_every_kind_of_change_is_made() -> None:
    assert {each.what for each in mutants_of(MODULE)} >= {
        "left out", "swapped", "taken for true", "taken for false", "part left out", "other comparison", "min and max",
    }  # fmt: skip


def test_a_mutant_that_breaks_a_rule_is_found_and_one_that_nobody_runs_is_unseen() -> None:
    file = Streams.pump.__code__.co_filename
    every = measure(trials(0)[:1], {file})
    found, text = judge(one("Streams.durable", "left out", "stream.durable = number"), every, 5.0)
    assert found is every[0], text
    unseen = one("Streams.stop", "left out", "self.limit =")
    assert judge(unseen, every, 5.0) == (None, "no run comes there")
