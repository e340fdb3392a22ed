"""The command line over real nodes: from nothing to a takeover, and back to nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockrepl.cli import processes
from blockrepl.definition import Definition, load
from scripts.ports import free_ports
from tests.cli.conftest import NODES, Run
from tests.patience import patient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed (qemu-utils)"),
]


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Definition]:
    """A group of small volumes whose nodes do not exist yet; whatever runs at the end is stopped."""
    lines = ['[group]\nname = "real"\njournal = "16MiB"\nsecondary_journal = "16MiB"']
    lines.append(f"[policy]\nlink_timeout_s = {patient(20.0)}\nhold_s = {patient(60.0)}")
    ports = iter(free_ports(2 * len(NODES)))
    for name, role in NODES:
        lines.append(f'[[node]]\nname = "{name}"\nrole = "{role}"\ndirectory = "{name}"')
        lines.append(f'listen = "127.0.0.1:{next(ports)}"' if role != "primary" else "")
        lines.append(f'nbd = "127.0.0.1:{next(ports)}"' if role != "intermediate" else "")
    for name, primary, secondary in (("data", "p1", "s1"), ("log", "p2", "s2")):
        lines.append(f'[[volume]]\nname = "{name}"\nsize = "8MiB"\nprimary = "{primary}"\nsecondary = "{secondary}"')
    path = tmp_path / "real.toml"
    path.write_text("\n".join(lines))
    definition = load(path)
    yield definition
    for node in definition.nodes:
        processes.stop(node, 5)


def qemu_io(definition: Definition, node: str, volume: str, *commands: str) -> str:
    options = [option for command in commands for option in ("-c", command)]
    uri = f"nbd://{definition.node(node).nbd}/{volume}"
    done = subprocess.run(["qemu-io", "-f", "raw", *options, uri], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_group_lives_loses_its_primary_site_and_goes_on_at_the_other(real: Definition, run: Run) -> None:
    created = run("create", real.path)
    assert (created.code, len(created.out.splitlines())) == (0, 5)
    up = run("up", real.path, "--timeout", f"{patient(90):g}")
    assert (up.code, up.err) == (0, "")
    qemu_io(real, "p1", "data", "write -P 65 0 1M", "write -P 66 4096 4096", "flush")
    qemu_io(real, "p2", "log", "write -P 67 1M 64k", "flush")

    verified = run("verify", "real", "--json")
    assert (verified.code, [volume["same"] for volume in verified.json["volumes"]]) == (0, [True, True])
    image = real.node("s1").directory / "data.img"
    for content, code in ((b"not what the host wrote", 1), (bytes(23), 0)):
        with image.open("r+b") as file:
            file.seek(4 << 20)
            file.write(content)
        assert run("verify", "real/data").code == code
    status = run("status", "real", "--json").json
    assert [node["ready"] for node in status["nodes"]] == [True] * 5
    assert [volume["primary"]["state"] for volume in status["volumes"]] == ["PAIR", "PAIR"]
    assert [volume["secondary"]["active"] for volume in status["volumes"]] == [False, False]
    assert run("journal", "real").code == 0

    for name in ("p1", "p2"):
        pid = processes.pid_of(real.node(name))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    rehearsed = run("takeover", "real", "--dry-run", "--json").json
    assert (rehearsed["dry_run"], rehearsed["lost_writes"]) == (True, 0)
    taken = run("takeover", "real", "--json")
    assert (taken.code, taken.json["lost_writes"], taken.json["lost_bytes"]) == (0, 0, 0)
    assert {volume["name"]: volume["node"] for volume in taken.json["volumes"]} == {"data": "s1", "log": "s2"}

    exports = {volume["name"]: volume["exports"] for volume in run("ls", "real", "--json").json["groups"][0]["volumes"]}
    assert exports["data"] == [f"nbd://{real.node('s1').nbd}/data"]
    read = qemu_io(real, "s1", "data", "read -P 65 0 4096", "read -P 66 4096 4096", "read -P 65 8192 4096")
    assert "Pattern verification failed" not in read
    assert "Pattern verification failed" not in qemu_io(real, "s2", "log", "read -P 67 1M 64k", "write -P 1 0 4k")

    again = run("up", real.path, "--timeout", f"{patient(30):g}")
    assert again.code == 33
    assert "node i1 runs, but will not become ready (fenced" in again.err
    down = run("down", "real")
    assert down.code == 0
    assert down.out.splitlines()[2:] == ["i1: stopped", "s1: stopped", "s2: stopped"]
    assert [processes.pid_of(node) for node in real.nodes] == [None] * 5


def test_create_never_overwrites_and_says_what_it_made_before(real: Definition, run: Run) -> None:
    assert run("create", real.path, "--node", "i1").code == 0
    journal = real.node("i1").directory / "journal"
    before = journal.stat()
    again = run("create", real.path)
    assert again.code == 2
    assert "i1/journal exists already" in again.err
    assert "kept: p1, p2" in again.err
    assert journal.stat() == before


def test_serve_of_a_node_that_was_not_created_stops_and_says_how(real: Definition, run: Run) -> None:
    result = run("serve", real.path, "--node", "i1")
    assert result.code == 21
    assert "blockrepl create" in result.err
