"""What a node refuses to start on, as a process: exit code, words, and nothing half-done."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockrepl.cli import processes
from blockrepl.errors import InUseError, MissingError, UsageError
from tests.system.conftest import MakeGroup
from tests.system.group import A, RealGroup, answers, wait_for


@pytest.mark.parametrize(("name", "file"), [("i1", "journal"), ("s1", "journal"), ("p1", "state"), ("s1", "data.img")])
def test_a_missing_file_stops_the_node_instead_of_beginning_anew(make_group: MakeGroup, name: str, file: str) -> None:
    group = make_group().create()
    path = group.node(name).directory / file
    path.unlink()
    group.start(name, wait=False)
    assert group.ended(name) == MissingError.exit_code
    assert str(path) in group.log(name)
    assert not path.exists()


def test_a_missing_directory_stops_the_node(make_group: MakeGroup) -> None:
    group = make_group().create()
    group.node("i1").directory.rename(group.folder / "unmounted")
    served = group.cli("serve", "--node", "i1")
    assert served.returncode == MissingError.exit_code
    assert not group.node("i1").directory.exists()


@pytest.mark.parametrize("name", ["p1", "i1", "s1"])
def test_a_second_process_on_the_same_files_is_refused_and_the_first_goes_on(make_group: MakeGroup, name: str) -> None:
    group = make_group().create()
    group.start(name, wait=False)
    first = group.pid(name)
    wait_for(lambda: answers(lambda: group.status(name)), "the first process answers")
    second = group.cli("serve", "--node", name)
    assert second.returncode == InUseError.exit_code, second.stderr
    assert "another process runs this node" in second.stderr
    assert processes.pid_of(group.node(name)) == first


def test_an_image_with_data_is_refused_and_nothing_is_made(make_group: MakeGroup) -> None:
    group = make_group()
    directory = group.node("p1").directory
    directory.mkdir()
    image = directory / f"{A}.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(1 << 20)
        file.write(b"somebody's data")
    before = image.read_bytes()
    created = group.cli("create", str(group.path), "--node", "p1")
    assert created.returncode == UsageError.exit_code
    assert "data" in created.stderr
    assert sorted(directory.iterdir()) == [image]
    assert image.read_bytes() == before


def test_create_again_is_refused_and_changes_nothing(make_group: MakeGroup) -> None:
    group = make_group().create()
    before = {path: path.stat().st_mtime_ns for path in _files(group)}
    assert group.cli("create", str(group.path)).returncode == UsageError.exit_code
    assert {path: path.stat().st_mtime_ns for path in _files(group)} == before


def _files(group: RealGroup) -> list[Path]:
    return sorted(path for path in group.folder.rglob("*") if path.is_file())
