"""Rounds of pair life: split and resync, the journal full while hosts go on, takeover and takeback, solo primaries."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blockrepl.errors import BlockreplError
from scripts.torturelib.faults import Storm
from scripts.torturelib.group import INTERMEDIATE, NAMES, NODES
from scripts.torturelib.images import differing_blocks
from scripts.torturelib.life import Life, Round
from scripts.torturelib.stamps import BLOCK_BYTES

BITMAP_BLOCK_BYTES = 64 << 10  # the definition's default
ALLOWED_EXCESS = 1.05
SLACK_BYTES = 2 << 20  # heartbeats, and the database, which nobody counts here


def split_and_resync(life: Life) -> Round:
    """Hosts write on while the pair is split; the split side is one prefix; only what differs is sent afterwards."""
    round_ = life.now = Round("split, resync")
    group = life.group
    with life.load(round_):
        _order(life, round_, INTERMEDIATE, "pair_split")
        wait_for_pair(life, "PSUS")
        time.sleep(life.chance.uniform(0.5, 2.0))
    life.check(round_, 1 - group.direction, may_lose=True, spare_database=True)
    life.check(round_, group.direction, may_lose=False)
    if life.chance.random() < 0.5:
        with counted_resync(life, round_):
            _order(life, round_, INTERMEDIATE, "pair_resync")
            wait_for_pair(life, "PAIR")
    else:
        with life.load(round_):
            _order(life, round_, INTERMEDIATE, "pair_resync")
            if life.chance.random() < 0.6:
                _faults(life, round_)
            wait_for_pair(life, "PAIR")
    life.at_rest(round_)
    return round_


def full_and_suspended(life: Life) -> Round:
    """on_full = "suspend": a target stays away until the journal is full; hosts go on; it comes back by itself."""
    round_ = life.now = Round("journal full, suspend")
    group = life.group
    away = life.chance.choice(group.targets)
    with life.load(round_):
        life.tell(round_, f"cut {away} off until the journal is full")
        for pair in ((away, INTERMEDIATE), (INTERMEDIATE, away)):
            group.network.cut(*pair)
        wait_for_pair(life, "PFUS")
        before = life.history.acknowledged
        group.wait_for(lambda: life.history.acknowledged > before + 50, "hosts go on beside a full journal")
        group.heal()
        wait_for_pair(life, "PAIR")
    if round_.host_errors:
        round_.problems.append(f"hosts saw {round_.host_errors} errors, though the journal was only full")
    life.at_rest(round_)
    return round_


def take_back(life: Life) -> Round:
    """After a takeover: the old site returns as target, by delta only; hosts at the new source write meanwhile."""
    round_ = life.now = Round(f"takeback to {'secondary' if life.group.direction else 'primary'}")
    group = life.group
    group.start(wait=False)
    group.wait_for(lambda: all(map(group.status, NODES)), "every node answers")
    if life.chance.random() < 0.5:
        with counted_resync(life, round_):
            _swap(life, round_)
            wait_for_pair(life, "PAIR")
    else:
        with life.load(round_):
            _swap(life, round_)
            if life.chance.random() < 0.4:
                _faults(life, round_)
            wait_for_pair(life, "PAIR")
    life.doubtful = set()
    life.at_rest(round_)
    return round_


def rolling_disaster(life: Life) -> Round:
    """fence = "never": a primary is cut off, goes on alone; the others follow, or the site is lost before."""
    round_ = life.now = Round("rolling disaster")
    group = life.group
    lost = life.chance.random() < 0.5
    alone = life.chance.choice(group.sources)
    with life.load(round_) as load:
        life.tell(round_, f"{alone} is cut off from the intermediate, and goes on alone")
        for pair in ((alone, INTERMEDIATE), (INTERMEDIATE, alone)):
            group.network.cut(*pair)
        group.wait_for(lambda: _alone(life, alone), f"{alone} goes on alone")
        time.sleep(life.chance.uniform(0.1, 3.0))
        if lost:
            life.tell(round_, "the whole site is lost")
            group.kill((*group.sources, INTERMEDIATE))
            life.take_over(round_)
            load.ending.set()
        else:
            group.network.heal()
            _resync_if_suspended(life, round_)
            wait_for_pair(life, "PAIR")
            group.heal()
    if not lost:
        life.at_rest(round_)
        return round_
    group.network.heal()
    group.direction = 1 - group.direction
    life.check(round_, group.direction, may_lose=True)
    life.history.rebase(life.content(group.direction))
    return round_


def _alone(life: Life, node: str) -> bool:
    return bool(life.group.status(node).get("state") == "suspended")


def _resync_if_suspended(life: Life, round_: Round) -> None:
    group = life.group
    group.wait_for(lambda: group.status(INTERMEDIATE).get("pair"), "the intermediate answers")
    if group.status(INTERMEDIATE)["pair"] not in ("PAIR", "COPY"):
        _order(life, round_, INTERMEDIATE, "pair_resync")


def _swap(life: Life, round_: Round) -> None:
    _order(life, round_, life.chance.choice(life.group.sources), "reform")


def _order(life: Life, round_: Round, node: str, command: str, **args: Any) -> dict[str, Any]:
    """An operator's word, repeated while it is refused for now."""
    life.tell(round_, f"{command} at {node}")
    result: dict[str, Any] = {}
    refusals: list[str] = []

    def again() -> bool:
        try:
            result.update(life.group.ask(node, command, **args))
        except BlockreplError as error:
            if str(error) not in refusals:
                refusals.append(str(error))
                life.group.say(f"{command}: {error}")
            time.sleep(0.3)
            return False
        return True

    life.group.wait_for(again, f"{command} at {node} is done")
    return result


def wait_for_pair(life: Life, state: str) -> None:
    """As the intermediate says. Raises BrokenPromiseError."""
    life.group.wait_for(lambda: life.group.status(INTERMEDIATE).get("pair") == state, f"the pair is {state}")


def _faults(life: Life, round_: Round) -> None:
    """In the middle of a resync."""
    time.sleep(life.chance.uniform(0.0, 0.5))
    storm = Storm(life.group, life.chance)
    storm.strike()
    round_.faults += storm.happened
    time.sleep(life.chance.uniform(0.1, 2.0))
    storm.undo()


@contextmanager
def counted_resync(life: Life, round_: Round) -> Iterator[None]:
    """Hosts are quiet: what arrives at the targets is compared with the bitmap blocks that differ.

    Doubtful is what hosts wrote just before a primary died: above its checkpoint nobody knows what its disk holds.
    """
    group = life.group
    before = group.network.received_bytes(group.targets)
    differing = {
        (volume, block * BLOCK_BYTES // BITMAP_BLOCK_BYTES)
        for volume, name in enumerate(NAMES)
        for block in differing_blocks(group.image(name, 0), group.image(name, 1))
    }
    doubtful = {(volume, block * BLOCK_BYTES // BITMAP_BLOCK_BYTES) for volume, block in life.doubtful} - differing
    differing_bytes, doubtful_bytes = (BITMAP_BLOCK_BYTES * len(blocks) for blocks in (differing, doubtful))
    yield
    after = group.network.received_bytes(group.targets)
    if before is None or after is None:
        return
    sent = after - before
    round_.notes["resync"] = {
        "sent_bytes": sent, "differing_bytes": differing_bytes, "doubtful_bytes": doubtful_bytes,
    }  # fmt: skip
    text = f"resync: {sent >> 10} KiB sent; in bitmap blocks {differing_bytes >> 10} KiB differed"
    life.tell(round_, f"{text}, {doubtful_bytes >> 10} KiB were doubtful")
    if sent > ALLOWED_EXCESS * (differing_bytes + doubtful_bytes) + SLACK_BYTES:
        round_.problems.append(text)
