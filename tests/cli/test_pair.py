"""``pair``, ``replace``, ``node``, ``explain``, ``bitmap``, asked of fake nodes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.conftest import FakeGroup, Run

DONE = [{"result": {"pair": "PSUS", "step": "nothing", "number": 7}}]
EPOCH = {"number": 4, "id": "aa" * 16}
TAKEN = {"number": 5, "id": "bb" * 16}


def middle(**more: Any) -> dict[str, Any]:
    return {"state": "serving", "pair": "PAIR", "epoch": EPOCH, "direction": 0, **more}


def source(**more: Any) -> dict[str, Any]:
    return {"state": "live", "pair": "PAIR", "incarnation": 1, "epoch": EPOCH, "direction": 0, **more}


def target(**more: Any) -> dict[str, Any]:
    return {"state": "following", "pair": "PAIR", "copying": False, "epoch": EPOCH, **more}


def taken(**more: Any) -> dict[str, Any]:
    return source(state="suspended", suspended="SSWS", alone=True, epoch=TAKEN, taken_at=80, direction=1, **more)


@pytest.mark.parametrize(
    ("arguments", "request_made"),
    [
        (["pair", "split"], ["pair_split", {"writable": False}]),
        (["pair", "split", "--rw"], ["pair_split", {"writable": True}]),
        (["pair", "create", "--no-copy"], ["pair_create", {"no_copy": True, "rate_bytes": 0}]),
        (["pair", "resync", "--rate", "50MiB"], ["pair_resync", {"verify": False, "rate_bytes": 50 << 20}]),
        (["pair", "resync", "--verify"], ["pair_resync", {"verify": True, "rate_bytes": 0}]),
        (["pair", "delete"], ["pair_delete", {}]),
        (["node", "exclude", "p2"], ["exclude", {"node": "p2"}]),
        (["node", "include", "p2"], ["include", {"node": "p2"}]),
    ],
)
def test_the_intermediate_is_asked(
    group: FakeGroup, run: Run, arguments: list[str], request_made: list[Any]
) -> None:  # fmt: skip
    group.plan("i1", status=middle(), answers={request_made[0]: DONE})
    run("up", group.path)
    result = run(*arguments, "-f", group.path)
    assert (result.code, result.out) == (0, "demo: PSUS, nothing\n")
    assert group.requests("i1") == [request_made]


def test_a_state_that_forbids_a_command_is_told_with_what_comes_first(group: FakeGroup, run: Run) -> None:
    answer = [{"error": ["UsageError", "pair split is not possible in state SMPL"]}]
    group.plan("i1", status=middle(pair="SMPL"), answers={"pair_split": answer})
    run("up", group.path)
    result = run("pair", "split", group.path)
    assert (result.code, result.err) == (2, "blockrepl: pair split is not possible in state SMPL\n")


@pytest.mark.parametrize(
    ("state", "code"), [("SMPL", 1), ("COPY", 2), ("PAIR", 3), ("PSUS", 4), ("PSUE", 5), ("PFUL", 7), ("PFUS", 8)]
)
def test_wait_without_waiting_says_the_state_by_exit_code(group: FakeGroup, run: Run, state: str, code: int) -> None:
    group.plan("i1", status=middle(pair=state))
    run("up", group.path)
    result = run("pair", "wait", group.path, "--no-wait", "--json")
    assert (result.code, result.json["pair"]) == (code, state)


def test_wait_ends_with_0_or_with_the_code_of_its_timeout(group: FakeGroup, run: Run) -> None:
    group.plan("i1", status=middle(pair="PSUS", pair_reason="split"))
    run("up", group.path)
    assert run("pair", "wait", group.path, "-s", "pair,psus", "-t", "5").code == 0
    late = run("pair", "wait", group.path, "-s", "PAIR", "-t", "0.1")
    assert (late.code, late.out) == (233, "demo: PSUS (split)\n")
    wrong = run("pair", "wait", group.path, "-s", "PAIRED")
    assert (wrong.code, "SMPL, COPY" in wrong.err) == (2, True)


def test_after_a_takeover_the_state_is_ssws_whatever_the_old_intermediate_says(group: FakeGroup, run: Run) -> None:
    group.plan("i1", status=middle())
    group.plan("p1", status=source())
    group.plan("s1", status=taken())
    run("up", group.path)
    assert run("pair", "wait", group.path, "--no-wait").code == 9


def test_a_planned_swap_takes_over_first_and_only_where_nothing_is_lost(group: FakeGroup, run: Run) -> None:
    group.plan("i1", status=middle())
    group.plan("p1", status=source(), answers={"reform": [{"result": REFORMED}]})
    group.plan("s1", status=target(), answers={"takeover": [{"result": {"drained": False, "pair": "PFUS"}}]})
    run("up", group.path)
    refused = run("pair", "resync", "--swap", group.path)
    assert (refused.code, "a takeover now loses" in refused.err) == (2, True)
    assert group.requests("s1") == [["takeover", {"dry_run": True, "planned": True}]]
    assert group.requests("p1") == []


def test_a_busy_intermediate_is_asked_again_before_a_swap_is_refused(group: FakeGroup, run: Run) -> None:
    busy: list[Any] = [{"result": {"drained": False, "without": "no answer"}}]
    done: list[Any] = [{"result": {"drained": True, "lossless": True}}]
    group.plan("i1", status=middle())
    group.plan("p1", status=source(), answers={"reform": [{"result": REFORMED}]})
    group.plan("s1", status=target(), answers={"takeover": [busy, busy, done]})
    group.plan("s2", status=target(), answers={"takeover": busy})
    run("up", group.path)
    assert run("pair", "resync", "--swap", group.path).code == 0
    assert [args for _, args in group.requests("s1")] == [{"dry_run": True, "planned": True}] * 3 + [{"planned": True}]
    run("down", group.path, "--node", "s1")
    refused = run("pair", "resync", "--swap", group.path)
    assert (refused.code, "s2 does not reach the intermediate (no answer)" in refused.err) == (2, True)


REFORMED: dict[str, Any] = {
    "sources": ["s1", "s2"], "targets": ["p1", "p2"], "number": 81, "epoch": {"number": 6, "id": "cc" * 16},
    "out_of_sync_bytes": 65536, "reasons": [], "dry_run": False,
}  # fmt: skip


def test_a_swap_is_led_by_the_newest_source(group: FakeGroup, run: Run) -> None:
    group.plan("p1", status=source(state="detached"))
    group.plan("s2", status=taken(), answers={"reform": [{"progress": {"step": "asking"}}, {"result": REFORMED}]})
    run("up", group.path)
    result = run("pair", "resync", "--swap", "--verify", group.path)
    assert result.out.startswith("demo: s1, s2 copy to p1, p2, above number 81, epoch 6\n")
    assert "64 KiB" in result.out
    asked = {"kind": "swap", "verify": True, "dry_run": False, "force": False, "planned": False}
    assert group.requests("s2") == [["reform", asked]]


def test_a_swap_of_a_pair_that_is_not_in_order_is_refused_in_words(group: FakeGroup, run: Run) -> None:
    """Nobody has taken over: it would give up what the primaries completed alone."""
    group.plan("i1", status=middle(pair="PSUE", pair_reason="primary 1 may have gone on alone"))
    group.plan("p1", status=source())
    group.plan("s1", status=target())
    run("up", group.path)
    refused = run("pair", "resync", "--swap", group.path)
    assert refused.code == 2
    assert "not possible in state PSUE (primary 1 may have gone on alone)" in refused.err
    assert (group.requests("p1"), group.requests("s1")) == ([], [])


def test_force_belongs_to_a_swap(group: FakeGroup, run: Run) -> None:
    assert run("pair", "resync", "--force", group.path).code == 2


def test_replace_asks_a_source_and_names_the_node(group: FakeGroup, run: Run) -> None:
    group.plan("p1", status=source(), answers={"reform": [{"result": REFORMED}]})
    for name in ("state", "journal"):
        (group.node("s1").directory / name).write_bytes(b"")
    run("up", group.path)
    assert run("replace", "--node", "s1", group.path).code == 0
    asked = {"kind": "replace", "node": "s1", "dry_run": False, "force": False}
    assert group.requests("p1") == [["reform", asked]]


def test_explain_lists_what_only_the_old_primary_has_and_both_ways_on(group: FakeGroup, run: Run) -> None:
    open_writes = [
        {"volume": "data", "number": 70, "offset_bytes": 0, "length_bytes": 4096},
        {"volume": "data", "number": 85, "offset_bytes": 8192, "length_bytes": 4096},
        {"volume": "data", "number": None, "offset_bytes": 12288, "length_bytes": 512},
    ]
    bits = {"node": "p1", "volumes": [], "open_writes": open_writes}
    group.plan("p1", status=source(state="detached", reason="fenced"), answers={"bitmap": [{"result": bits}]})
    group.plan("s1", status=taken(history=[{**EPOCH, "last": 80}]))
    run("up", group.path)
    found = run("explain", "--json", group.path).json
    assert (found["pair"], found["takeover"], found["old_sources"]) == ("SSWS", None, ["p1"])
    assert [write["number"] for write in found["unreplicated"]] == [85, None]
    assert found["epochs"][0]["last"] == {"s1": 80}
    assert len(found["ways"]) == 2
    assert found["next"][-1] == "blockrepl pair resync demo --swap"
    text = run("explain", group.path).out
    assert "p1/data: 512 bytes at 12288, never numbered" in text


def test_explain_says_what_a_takeover_now_would_lose(group: FakeGroup, run: Run) -> None:
    dry = {"number": 90, "drained": False, "lost_writes": 12, "lost_bytes": 49152, "lost_s": 0.25, "missing": []}
    group.plan("i1", status=middle(pair="PSUS", pair_reason="split"))
    group.plan("s1", status=target(), answers={"takeover": [{"result": dry}]})
    run("up", group.path)
    text = run("explain", group.path).out
    assert "demo is in PSUS" in text
    assert "loses 12 writes that are known, 48 KiB of them held here, 0.2 s; whether there are more is not" in text
    assert "next: blockrepl pair resync demo" in text


def test_explain_says_what_hosts_completed_alone(group: FakeGroup, run: Run) -> None:
    dry = {"number": 90, "drained": False, "lost_writes": 0, "lost_bytes": 0, "alone": True, "lossless": False}
    group.plan("s1", status=target(pair="PSUE"), answers={"takeover": [{"result": dry}]})
    group.plan("p1", status=source(pair="PSUE", out_of_sync_bytes={"data": 131072}))
    group.plan("p2", status=source(pair="PSUE", out_of_sync_bytes={"log": 65536}))
    for nodes, said in ((["s1", "p1"], "how much is not known here"), (["p2"], "at most 192 KiB in blocks")):
        for node in nodes:
            run("up", group.path, "--node", node)
        text = run("explain", group.path).out
        assert "nothing that was acknowledged" not in text
        assert f"and all that hosts at the other site completed alone: {said}" in text


def test_status_says_pair_direction_and_what_is_out_of_sync(group: FakeGroup, run: Run) -> None:
    resync = {"id": 5, "copied_bytes": 1 << 20, "total_bytes": 4 << 20}
    group.plan("i1", status=middle(pair="COPY", out_of_sync_bytes={"hop2": 65536}))
    group.plan("p1", status=source(pair="COPY", out_of_sync_bytes={"data": 131072}, resync=resync))
    run("up", group.path)
    line = run("status", group.path).out.splitlines()[1]
    assert line == ("COPY  primaries to secondaries  out of sync: hop 1 128 KiB, hop 2 64 KiB  resync: 25% of 4 MiB")
    found = run("status", "--json", group.path).json
    assert (found["pair"], found["direction"], found["out_of_sync_bytes"]) == (
        "COPY",
        0,
        {"hop1": 131072, "hop2": 65536},
    )
