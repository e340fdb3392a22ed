"""What the random walk makes of what commands say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.torturelib.healing import hinted
from scripts.torturelib.typed import Answer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        ("it is split: blockrepl pair resync", ("pair", "resync")),
        ("wait for the copy to end: blockrepl pair wait -s PAIR -t 600", ("pair", "wait", "-s", "PAIR", "-t", "600")),
        ("start it: `blockrepl up --node s1`; one that is lost: `blockrepl replace --node s1`", ("up", "--node", "s1")),
        ("to swap the sites: blockrepl pair resync --swap; it takes over at the other site first", ()),
        ("take over at the other site first, then: blockrepl replace --node p1", ()),
        ("is the port taken?", ()),
    ],
)
def test_a_hint_is_followed_where_it_can_lose_nothing(hint: str, words: tuple[str, ...]) -> None:
    assert hinted(Answer(("pair", "split"), 2, "", f"blockrepl: no\nhint: {hint}\n")) == words


def test_a_refusal_that_does_not_say_what_to_type_next_is_a_broken_promise() -> None:
    def manners(code: int, err: str) -> str:
        return Answer(("pair", "split"), code, "", err).bad_manners

    assert not manners(0, "")
    assert not manners(2, "blockrepl: it is split\nhint: blockrepl pair resync\n")
    assert not manners(233, "")
    assert manners(2, "blockrepl: it is split\n")
    assert manners(10, "blockrepl: internal error\nhint: see node.log\n")
    assert manners(2, "Traceback (most recent call last):\nhint: none\n")


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_a_walk_keeps_the_promise_and_says_what_was_typed(tmp_path: Path) -> None:
    path = tmp_path / "walk.json"
    argv = [
        sys.executable,
        "-m",
        "scripts.torturelib",
        "--json",
        str(path),
        "--only",
        "walk",
        "--short",
        "--rounds",
        "2",
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=2600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    begin, walked = json.loads(path.read_text())["rounds"]
    assert begin["acknowledged"] >= 30
    assert len(walked["faults"]) >= 4
    assert walked["blocks_compared"] > 0
