"""Whole runs, with whatever this machine has."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockrepl.definition import load
from scripts.benchlib import ours
from scripts.benchlib.__main__ import names
from scripts.benchlib.ours import Node, Volume, definition
from scripts.benchlib.process import NotAvailableError
from scripts.benchlib.systems import Lag

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.benchlib", *arguments]


def processes_that_name(path: Path) -> list[str]:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(path) in line and str(os.getpid()) != file.parent.name:
            lines.append(line)
    return lines


def test_definition_that_it_writes_is_one_that_blockrepl_reads(tmp_path: Path) -> None:
    nodes = [Node("p1", "primary", 10809), Node("i1", "intermediate"), Node("s1", "secondary"), Node("s2", "secondary")]
    volumes = [Volume("data", "s1", 1 << 20, "nbd"), Volume("other", "s2", 1 << 20, "loop")]
    file = tmp_path / "group.toml"
    file.write_text(definition("bench", 64 << 20, nodes, volumes))
    loaded = load(file)
    assert [node.name for node in loaded.local_nodes()] == ["p1", "i1", "s1", "s2"]
    assert [volume.size_bytes for volume in loaded.volumes] == [1 << 20, 1 << 20]
    assert loaded.node("s1").directory == tmp_path / "s1"


def test_unknown_name_lists_the_known_ones() -> None:
    assert names(["a", "b", "c"], "system", "c,a") == ["a", "c"]
    with pytest.raises(argparse.ArgumentTypeError, match="no system 'd'; there are a, b, c"):
        names(["a", "b", "c"], "system", "a,d")


def test_run_writes_its_json_and_leaves_nothing_behind(tmp_path: Path) -> None:
    images, file = tmp_path / "images", tmp_path / "bench.json"
    size = ["--size", "16", "--runtime", "0.05", "--rounds", "3", "--dir", str(images), "--json", str(file)]
    done = subprocess.run(
        bench("--only", "disk,nbdkit", "--work", "randwrite-4k-qd32", *size),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    measured = {result["system"]: result for result in document["results"]}
    assert measured["disk"]["rounds"] == 3
    assert measured["disk"]["iops"] > 0
    if shutil.which("nbdkit") and shutil.which("fio"):
        assert measured["nbdkit"]["server_cpu_us_per_op"] >= 0
        assert measured["nbdkit"]["rss_bytes"]["nbdkit"] > 0
    else:
        assert "is not installed" in document["skipped"]["nbdkit"]
    assert list(images.iterdir()) == []


def test_missing_peer_is_skipped_with_the_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ["--only", "disk,qemu-nbd", "--work", "randwrite-4k-qd1", "--size", "16", "--runtime", "0.05"]
    done = subprocess.run(
        bench(*arguments, "--dir", str(tmp_path / "images"), "--json", str(file)),
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert document["skipped"] == {"qemu-nbd": "not available: qemu-nbd is not installed"}
    assert [result["system"] for result in document["results"]] == ["disk"]


@pytest.mark.skipif(not (shutil.which("nbdkit") and shutil.which("fio")), reason="nbdkit or fio is not installed")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted_run_stops_its_servers_and_removes_its_files(tmp_path: Path, number: signal.Signals) -> None:
    images = tmp_path / "images"
    arguments = bench("--only", "nbdkit,loop-nbdfuse", "--size", "16", "--runtime", "30", "--dir", str(images))
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if "round 1" in line:
                break
        assert processes_that_name(images) != []
        run.send_signal(number)
        said = run.stderr.read()
        assert run.wait() == 130, said
    assert list(images.iterdir()) == []
    # The run itself names the directory too, and has ended.
    assert processes_that_name(images) == []
    loops = [file.read_text().strip() for file in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert [path for path in loops if str(images) in path] == []


def test_lag_is_that_of_the_secondary_that_is_behind_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peers = [
        {"node": "p1"},
        {"node": "s1", "lag_writes": 7, "lag_bytes": 10},
        {"node": "s2", "lag_writes": 2, "lag_bytes": 99},
    ]
    monkeypatch.setattr(ours, "call", lambda directory, command: {"peers": peers})
    assert ours.lag(tmp_path) == Lag(7, 99)


def test_intermediate_that_does_not_answer_is_not_available(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="no node runs here"):
        ours.lag(tmp_path)
