"""What each command asks of which node, what it prints, and with which code it ends."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from blockrepl.cli import registry
from tests.cli.conftest import FakeGroup, Run

DEVICE = {"attach": [{"result": {"device": "/dev/loop7"}}], "detach": [{"result": {"device": "/dev/loop7"}}]}
MARKS = {"numbered": 90, "durable": 80, "sent": 80, "prepared": 70, "validated": 60, "applied": 50, "checkpoint": None}


def serving(name: str, *, active: bool = True, **more: Any) -> dict[str, Any]:
    """A node's status with one volume."""
    volume = {"name": name, "active": active, "state": "PAIR", "attached": None, **more}
    return {"volumes": [volume], "watermarks": MARKS, "epoch": {"number": 3, "id": "ab" * 16}}


# finding the definition


def test_a_running_group_is_found_by_its_name_alone_or_without_any(group: FakeGroup, run: Run) -> None:
    run("up", group.path)
    for target in ([group.path], ["demo"], ["-f", group.path], []):
        assert run("status", *target, "--json").json["group"] == "demo"


def test_without_definition_and_running_group_the_message_says_what_to_give(group: FakeGroup, run: Run) -> None:
    result = run("status")
    assert result.code == 2
    assert result.err == (
        "blockrepl: no definition given, and no group runs here\nhint: give one, such as targets/demo.toml\n"
    )


def test_the_environment_may_name_the_definition(group: FakeGroup, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKREPL_FILE", str(group.path))
    assert run("ls", "--json").json["groups"][0]["name"] == "demo"
    result = run("attach", "other/data")
    assert result.code == 2
    assert 'defines the group "demo", not "other"' in result.err


def test_an_unknown_group_is_answered_with_those_that_are_known(group: FakeGroup, run: Run) -> None:
    registry.register(group.definition)
    result = run("attach", "dmo/data")
    assert (result.code, result.err.splitlines()[1]) == (2, "hint: known here: demo")


def test_a_wrong_definition_is_an_error_with_its_code_in_every_command(tmp_path: Path, run: Run) -> None:
    (tmp_path / "wrong.toml").write_text("[group]\n")
    for command in ("create", "up", "down", "status", "ls", "takeover", "doctor"):
        result = run(command, tmp_path / "wrong.toml")
        assert (command, result.code) == (command, 3)
        assert result.err.startswith(f"blockrepl: {tmp_path}/wrong.toml: $.group: the key name is missing\nhint: ")


# attach, detach


def test_attach_asks_the_primary_and_prints_the_device_and_nothing_else(group: FakeGroup, run: Run) -> None:
    group.plan("p1", status=serving("data"), answers=DEVICE)
    group.plan("s1", status=serving("data", active=False), answers=DEVICE)
    run("up", group.path)
    assert run("attach", "demo/data", "--read-only") == (0, "/dev/loop7\n", "")
    assert run("detach", "demo/data") == (0, "/dev/loop7\n", "")
    assert group.requests("p1") == [["attach", {"volume": "data", "read_only": True}], ["detach", {"volume": "data"}]]
    assert group.requests("s1") == []


def test_attach_asks_the_secondary_that_has_taken_over(group: FakeGroup, run: Run) -> None:
    group.plan("p1", status=serving("data"), answers=DEVICE)
    group.plan("s1", status=serving("data", state="SSWS"), answers=DEVICE)
    run("up", group.path)
    assert run("attach", "demo/data").out == "/dev/loop7\n"
    assert group.requests("s1") == [["attach", {"volume": "data", "read_only": False}]]


def test_attach_where_no_node_serves_says_what_to_type(group: FakeGroup, run: Run) -> None:
    group.plan("s1", status=serving("data", active=False))
    run("up", group.path, "--node", "s1")
    result = run("attach", "demo/data")
    assert (result.code, result.out) == (4, "")
    assert "no node of this machine serves demo/data: p1 is down, s1 is serving" in result.err
    assert "blockrepl up" in result.err


def test_a_node_s_error_ends_the_command_with_its_code(group: FakeGroup, run: Run) -> None:
    group.plan("p1", status=serving("data"), answers={"attach": [{"error": ["EnvironmentLacksError", "no loop here"]}]})
    run("up", group.path)
    assert run("attach", "demo/data") == (5, "", "blockrepl: no loop here\n")


# status, ls


def test_status_shows_both_ends_watermarks_lag_and_journal(group: FakeGroup, run: Run) -> None:
    lag = {"node": "s1", "connected": True, "lag_writes": 20, "lag_bytes": 81920, "lag_s": 0.25}
    journal = {"size_bytes": 1000, "used_bytes": 420}
    group.plan("p1", status=serving("data"))
    group.plan("i1", status={"watermarks": MARKS, "peers": [lag], "journal": journal, "volumes": []})
    group.plan("s1", status={**serving("data", active=False), "promised": {"number": 4, "id": "cd"}})
    run("up", group.path)
    run("down", group.path, "--node", "s2")
    rows = [" ".join(line.split()) for line in run("status", group.path).out.splitlines()]
    assert rows[0].startswith("demo epoch 3 (abababab)")
    assert "data P-VOL p1 PAIR 90 80 70 60 50 - - - -" in rows
    assert "data S-VOL s1 PAIR 90 80 70 60 50 20 80 KiB 0.250 -" in rows
    assert "log S-VOL s2 down - - - - - - - - -" in rows
    assert "- intermediate i1 serving 90 80 70 60 50 - - - 42%" in rows
    assert "s1: has promised epoch 4" in rows


def test_status_json_keeps_integers_and_null(group: FakeGroup, run: Run) -> None:
    group.plan("p1", status=serving("data"))
    run("up", group.path, "--node", "p1")
    document = run("status", group.path, "--json").json
    assert (document["schema"], document["epoch"]["number"]) == (1, 3)
    assert document["nodes"][0]["watermarks"] == MARKS
    assert document["nodes"][3]["state"] == "down"
    assert document["volumes"][0]["lag"] == {"writes": None, "bytes": None, "s": None}
    assert document["volumes"][0]["primary"]["active"] is True
    assert "secondary" not in document["volumes"][2]


@pytest.mark.parametrize("interval", ["0", "-1", "x", "99999999"])
def test_a_strange_interval_is_refused(group: FakeGroup, run: Run, interval: str) -> None:
    assert run("status", group.path, "--", interval).code == 2


def test_ls_shows_exports_that_can_be_opened_and_devices_that_exist(group: FakeGroup, run: Run) -> None:
    group.plan("p1", status=serving("data", attached="/dev/loop3"))
    group.plan("s1", status=serving("data", active=False))
    run("up", group.path)
    volume = run("ls", group.path, "--json").json["groups"][0]["volumes"][0]
    assert volume["exports"] == [f"nbd://{group.node('p1').nbd}/data"]
    assert volume["attached"] == ["/dev/loop3"]
    assert f"nbd://{group.node('p1').nbd}/data" in run("ls").out


# takeover, verify

TAKEN = {
    "schema": 1, "dry_run": False, "drained": False, "number": 70, "lost_writes": 2, "lost_bytes": 8192,
    "epoch": {"number": 4, "id": "cd" * 16},
    "volumes": [{"name": "data", "node": "s1", "image": "/srv/s1/data.img", "writable": True}],
}  # fmt: skip


def test_takeover_asks_a_secondary_that_answers_and_tells_what_was_lost(group: FakeGroup, run: Run) -> None:
    group.plan("s2", answers={"takeover": [{"progress": {"step": "polling s1"}}, {"result": TAKEN}]})
    run("up", group.path, "--node", "s2")
    result = run("takeover", group.path)
    assert result.code == 0
    assert "s2: polling s1" in result.err
    assert "the secondaries are at number 70, epoch 4 (cdcdcdcd)" in result.out
    assert "lost: 2 writes that are known, 8 KiB of them held here; whether there are more is not" in result.out
    assert "data: /srv/s1/data.img at s1 read-write" in result.out
    assert group.requests("s2") == [["takeover", {"dry_run": False, "force": False, "read_only": False, "marker": ""}]]


def test_takeover_json_is_the_node_s_answer(group: FakeGroup, run: Run) -> None:
    group.plan("s1", answers={"takeover": [{"result": TAKEN}]})
    run("up", group.path)
    assert run("takeover", group.path, "--dry-run", "--force", "--read-only", "--json").json == TAKEN
    assert group.requests("s1") == [["takeover", {"dry_run": True, "force": True, "read_only": True, "marker": ""}]]


def test_takeover_without_a_running_secondary_says_what_to_start(group: FakeGroup, run: Run) -> None:
    result = run("takeover", group.path)
    assert result.code == 4
    assert f"hint: start them: blockrepl up {group.path} --node s1" in result.err


def verified(name: str, *ranges: int) -> dict[str, Any]:
    differing = [{"offset_bytes": offset, "length_bytes": 4096} for offset in ranges]
    return {"volume": name, "same": not ranges, "compared_bytes": 1 << 20, "differing": differing}


def test_verify_of_equal_ends_exits_0(group: FakeGroup, run: Run) -> None:
    group.plan("p1", answers={"verify": [{"progress": {"done_bytes": 1}}, {"result": verified("data")}]})
    group.plan("p2", answers={"verify": [{"result": verified("log")}]})
    run("up", group.path)
    result = run("verify", group.path)
    assert (result.code, result.out) == (0, "demo/data: the same, 1 MiB compared\ndemo/log: the same, 1 MiB compared\n")
    assert group.requests("p2") == [["verify", {"volume": "log"}]]


def test_verify_of_ends_that_differ_exits_1_and_says_where(group: FakeGroup, run: Run) -> None:
    group.plan("p1", answers={"verify": [{"result": verified("data", 8192, 20480)}]})
    run("up", group.path, "--node", "p1")
    for target in ((group.path, "data"), ("demo/data",)):
        result = run("verify", *target)
        assert result.code == 1
        assert result.out == "demo/data: differs in 8 KiB, in 2 ranges\n  4096 bytes at 8192\n  4096 bytes at 20480\n"
    assert run("verify", "demo/data", "--json").json["volumes"] == [verified("data", 8192, 20480)]


def test_verify_that_cannot_be_done_exits_2_whatever_the_reason(group: FakeGroup, run: Run) -> None:
    assert run("verify", group.path).code == 2
    assert run("verify", group.path, "absent").code == 2
    tmp = run("verify", group.path, "tmp")
    assert (tmp.code, tmp.err) == (2, "blockrepl: tmp has no secondary to compare with\n")


# config check, doctor


def test_config_check_names_every_problem_with_its_place(group: FakeGroup, run: Run) -> None:
    assert run("config", "check", group.path).out == f"{group.path}: ok: group demo, 5 nodes, 3 volumes\n"
    group.path.write_text(
        group.path.read_text().replace('secondary = "s1"', 'secondary = "s3"').replace('"1MiB"', '"1000"', 1)
    )
    result = run("config", "check", group.path)
    assert result.code == 3
    assert f"{group.path}: $.volume[0].size: 1000 bytes is no multiple of the block size 4096" in result.err
    assert f'{group.path}: $.volume[0].secondary: there is no node "s3"' in result.err
    places = [error["where"] for error in run("config", "check", "--json", group.path).json["files"][0]["errors"]]
    assert places == [f"{group.path}: $.volume[0].size", f"{group.path}: $.volume[0].secondary"]


def test_doctor_says_what_is_there_and_ends_with_0_when_the_main_job_can_run(group: FakeGroup, run: Run) -> None:
    document = run("doctor", group.path, "--json")
    assert (document.code, document.json["ok"]) == (0, True)
    names = [check["name"] for check in document.json["checks"]]
    assert {"python", "loop devices", "fuse", "fio", "mkfs.ext4", "room for p1", "port of i1"} <= set(names)
    assert all(check["ok"] or check["remedy"] for check in document.json["checks"])
    assert "the main job can run here" in run("doctor").out


def test_doctor_finds_a_port_that_another_process_uses(group: FakeGroup, run: Run) -> None:
    address = group.node("i1").address
    with socket.create_server((address.host, address.port)):
        result = run("doctor", group.path, "--json")
    bad = [check for check in result.json["checks"] if not check["ok"] and check["required"]]
    assert (result.code, [check["name"] for check in bad]) == (5, ["port of i1"])
    assert "Address already in use" in bad[0]["found"]


def test_help_names_every_command(run: Run) -> None:
    out = run("--help").out
    listed = {
        line.split()[0]
        for line in out.partition("Commands:")[2].splitlines()
        if line.startswith("  ") and line[2] != " "
    }
    assert listed == {
        "adjust",
        "create",
        "up",
        "down",
        "serve",
        "ls",
        "attach",
        "detach",
        "status",
        "takeover",
        "verify",
        "journal",
    } | {
        "doctor",
        "explain",
        "marker",
        "pair",
        "bitmap",
        "rebuild",
        "replace",
        "node",
        "config",
    }


def test_a_wrong_option_is_a_usage_error(run: Run) -> None:
    result = run("status", "--jsno")
    assert result.code == 2
    assert "--json" in result.err
