"""The main conversations, word for word. BLOCKREPL_TRANSCRIPTS=write writes them anew: read the difference."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockrepl.formats.link import Pair
from tests.sim.sites import SitesGroup
from tests.sim.transcript import Transcript

TEXTS = Path(__file__).parent.parent / "transcripts"


def start(talk: Transcript) -> None:
    talk.note("five processes start; nothing was ever written")
    talk.group.create()
    talk.quiet()


def one_write(talk: Transcript) -> None:
    start(talk)
    talk.lines.clear()
    talk.note("a host writes one block of volume 1")
    talk.write(1)
    talk.quiet()


def primary_reconnects(talk: Transcript) -> None:
    start(talk)
    talk.lines.clear()
    group = talk.group
    talk.note("p1 cannot reach the intermediate; a host writes")
    group.network.cut("p1", "i")
    talk.write(1)
    talk.quiet(1.5)
    talk.note("the network works again")
    group.network.heal_all()
    talk.quiet()


def primary_restarts(talk: Transcript) -> None:
    start(talk)
    talk.write(1)
    assert talk.group.world.run(talk.group.world.now_s + 1, lambda: talk.group.oracle.completions == 1)
    talk.lines.clear()
    talk.note("p1 is killed, with a write since its last checkpoint, and starts again")
    process = talk.group.primary("p1")
    process.crash()
    process.boot()
    talk.quiet()


def secondary_restarts(talk: Transcript) -> None:
    start(talk)
    talk.write(1)
    talk.quiet()
    talk.lines.clear()
    talk.note("s1 loses power; a host writes; s1 starts again")
    process = talk.group.secondary("s1")
    process.cut_power()
    talk.write(1)
    talk.quiet(1.5)
    process.power_on()
    process.boot()
    talk.quiet()


def takeover_with_the_intermediate(talk: Transcript) -> None:
    start(talk)
    talk.write(1)
    talk.quiet()
    talk.lines.clear()
    talk.note("an operator takes over at s1 while everything works")
    talk.group.operate("s1")
    talk.quiet(0.15)


def takeover_without_the_intermediate(talk: Transcript) -> None:
    start(talk)
    talk.write(1)
    talk.quiet()
    group = talk.group
    talk.lines.clear()
    talk.note("s1 is cut off; a host writes to a volume whose secondary is s2; then all but the secondaries burns")
    group.network.cut("i", "s1")
    talk.write(2)
    talk.quiet(0.3)
    for name in ("p1", "p2", "i"):
        group.processes[name].cut_power()
    talk.note("an operator takes over at s1: the write was acknowledged, but not at all secondaries")
    group.operate("s1")
    talk.quiet(3)


def split_and_resync(talk: Transcript) -> None:
    start(talk)
    talk.write(1)
    talk.quiet()
    talk.lines.clear()
    group = talk.group
    pairing = group.intermediate.host.role.pairing
    talk.note("pair split")
    group.pair("split")
    talk.quiet()
    talk.note("hosts write on, until the journal turns what it holds into bits")
    while pairing.marked <= pairing.suspended_at:
        talk.write(1, 8)
        talk.quiet(0.1)
    talk.quiet()
    talk.note("pair resync: a START in each stream, which jumps; p1 copies; an END in each stream, validated")
    assert not group.pair("resync")
    talk.quiet(2)
    assert pairing.pair is Pair.PAIR


def alone_and_resync(talk: Transcript) -> None:
    start(talk)
    talk.write(1)
    talk.quiet()
    talk.lines.clear()
    group = talk.group
    talk.note("fence never: p1 cannot reach the intermediate; its host writes; it goes on alone, then p2 does")
    group.network.cut("p1", "i")
    talk.write(1)
    talk.quiet(2)
    talk.write(2)
    talk.quiet(0.1)
    talk.note("the network works again")
    group.network.heal_all()
    talk.quiet()
    talk.note("pair resync")
    assert not group.pair("resync")
    talk.quiet(2)
    assert group.intermediate.host.role.pairing.pair is Pair.PAIR


def resync_in_mid_load(talk: Transcript) -> None:
    start(talk)
    talk.write(1)
    talk.quiet()
    group = talk.group
    pairing = group.intermediate.host.role.pairing
    group.pair("split")
    talk.quiet()
    while pairing.marked <= pairing.suspended_at:
        talk.write(1, 8)
        talk.quiet(0.1)
    talk.quiet()
    talk.lines.clear()
    talk.note("split, and the journal has turned what it held into bits; pair resync, while hosts write")
    assert not group.pair("resync")
    for _ in range(6):
        talk.write(1, 2)
        talk.write(2)
        talk.quiet(0.006)
    talk.quiet(2)
    assert pairing.pair is Pair.PAIR


def takeover_in_mid_resync(talk: Transcript) -> None:
    start(talk)
    talk.write(1)
    talk.quiet()
    group = talk.group
    pairing = group.intermediate.host.role.pairing
    group.pair("split")
    talk.quiet()
    while pairing.marked <= pairing.suspended_at:
        talk.write(1, 16)
        talk.quiet(0.1)
    talk.quiet()
    talk.note("split; pair resync --rate 1, so that its END does not come")
    talk.lines.clear()
    assert not group.pair("resync", rate_bytes=1)
    talk.quiet(1.5)
    assert group.secondary("s1").host.role.state.copying
    talk.note(
        "the primary site burns, and the intermediate; an operator takes over at s1: both go back to before the copy"
    )
    for name in ("p1", "p2", "i"):
        group.processes[name].cut_power()
    group.operate("s1")
    talk.quiet(3)
    assert len(group.active) == 2


def _sites(talk: Transcript) -> SitesGroup:
    """Both sites are data nodes; one write was made, and is at the secondaries."""
    start(talk)
    talk.write(1)
    talk.quiet()
    talk.lines.clear()
    assert isinstance(talk.group, SitesGroup)
    return talk.group


def swap(talk: Transcript) -> None:
    group = _sites(talk)
    problems: list[str] = []
    talk.note("pair resync --swap at s1: a rehearsal, a takeover that drains the intermediate, then the group anew")
    group.operator.swap(problems.append)
    talk.quiet(4)
    assert problems == [""]
    talk.note("a host writes at s1, which is the source now")
    talk.write(1, site=1)
    talk.quiet()
    assert group.quiet()


def takeback(talk: Transcript) -> None:
    group = _sites(talk)
    problems: list[str] = []
    talk.note("the primary site and the intermediate lose power; an operator takes over at s1; a host writes there")
    for name in ("p1", "p2", "i"):
        group.processes[name].cut_power()
    group.operator.take_over("s1", problems.append)
    talk.quiet(2)
    talk.write(1, site=1)
    talk.quiet()
    talk.note("power is back")
    for name in ("p1", "p2", "i"):
        group.processes[name].power_on()
        group.processes[name].boot()
    talk.quiet(0.1)
    talk.note("pair resync --swap: the old primaries become the copy; only what differs is sent")
    group.operator.swap(problems.append)
    talk.quiet(5)
    assert problems == ["", ""]
    assert group.quiet()


def intermediate_replaced(talk: Transcript) -> None:
    group = _sites(talk)
    problems: list[str] = []
    talk.note("the intermediate is lost, and an empty one starts in its place; a host writes, and waits")
    group.operator.wipe("i")
    talk.write(2)
    talk.quiet(0.1)
    talk.note("blockrepl replace --node i, at p1")
    group.operator.reform(problems.append, replaced="i")
    talk.quiet(5)
    assert problems == [""]
    assert group.quiet()


def secondary_replaced(talk: Transcript) -> None:
    group = _sites(talk)
    problems: list[str] = []
    talk.note("s1 is lost, and an empty one starts in its place; blockrepl replace --node s1, at p1")
    group.operator.wipe("s1")
    talk.quiet()
    group.operator.reform(problems.append, replaced="s1")
    talk.quiet(5)
    assert problems == [""]
    assert group.quiet()


OTHERS: dict[Callable[[Transcript], None], tuple[str, int]] = {
    split_and_resync: ("pairs", 64 << 10),
    alone_and_resync: ("never", 1 << 20),
    resync_in_mid_load: ("pairs", 64 << 10),
    takeover_in_mid_resync: ("pairs", 64 << 10),
    **dict.fromkeys((swap, takeback, intermediate_replaced, secondary_replaced), ("sites", 1 << 20)),
}  # story and ring
CONVERSATIONS = [
    start, one_write, primary_reconnects, primary_restarts, secondary_restarts, takeover_with_the_intermediate,
    takeover_without_the_intermediate, split_and_resync, alone_and_resync, resync_in_mid_load, takeover_in_mid_resync,
    swap, takeback, intermediate_replaced, secondary_replaced,
]  # fmt: skip


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=[each.__name__ for each in CONVERSATIONS])
def test_a_conversation_goes_as_written(conversation: Callable[[Transcript], None]) -> None:
    talk = Transcript(*OTHERS.get(conversation, ()))
    with talk.group.limits():
        conversation(talk)
    text = "\n".join(talk.lines) + "\n"
    path = TEXTS / f"{conversation.__name__}.txt"
    if os.environ.get("BLOCKREPL_TRANSCRIPTS") == "write":
        path.write_text(text)
    assert text == path.read_text()
