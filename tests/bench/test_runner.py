from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.benchlib import runner
from scripts.benchlib.fio import FileTarget, NbdTarget
from scripts.benchlib.process import NotAvailableError, cpu_s, running
from scripts.benchlib.runner import Settings, run
from scripts.benchlib.systems import Factory, Lag, Running
from scripts.benchlib.works import WORKS
from scripts.benchlib.workspace import Workspace, write_image
from scripts.ports import free_port

WORK = "randwrite-4k-qd1"


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of systems that were stopped. "a" and "b" write files, "broken" is an NBD server that does not exist."""
    names: list[str] = []

    def system(name: str) -> Factory:
        @contextmanager
        def factory(place: Workspace) -> Iterator[Running]:
            path = place.directory / name
            write_image(path, place.image_bytes)
            try:
                yield Running(NbdTarget(free_port()) if name == "broken" else FileTarget(path), {}, (path,))
            finally:
                names.append(name)

        return factory

    @contextmanager
    def missing(place: Workspace) -> Iterator[Running]:
        if place.directory.is_dir():
            raise NotAvailableError("not here")
        yield Running(FileTarget(place.directory), {}, ())

    factories = {name: system(name) for name in ("a", "broken", "b")}
    monkeypatch.setattr(runner, "FACTORIES", {**factories, "missing": missing})
    return names


def cells(*names: str) -> list[tuple[str, str]]:
    return [(WORK, name) for name in names]


def test_systems_take_turns_at_being_first(tmp_path: Path, stopped: list[str]) -> None:
    outcome = run(Settings(cells("a", "b"), 3, 0.01), Workspace(tmp_path, 1 << 16), lambda text: None)
    assert [each.system for each in outcome.measurements] == ["a", "b", "b", "a", "a", "b"]
    assert sorted(stopped) == ["a", "b"]


def test_system_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, stopped: list[str]) -> None:
    outcome = run(Settings(cells("a", "broken", "b"), 1, 0.01), Workspace(tmp_path, 1 << 16), lambda text: None)
    assert [each.system for each in outcome.measurements] == ["a", "b"]
    assert set(outcome.skipped) == {"broken"}
    assert outcome.skipped["broken"].startswith("failed at randwrite-4k-qd")
    assert sorted(stopped) == ["a", "b", "broken"]


def test_system_that_cannot_be_started_is_skipped_with_the_reason(tmp_path: Path, stopped: list[str]) -> None:
    outcome = run(Settings(cells("missing", "a"), 1, 0.01), Workspace(tmp_path, 1 << 16), lambda text: None)
    assert outcome.skipped == {"missing": "not available: not here"}
    assert [each.system for each in outcome.measurements] == ["a"]
    assert stopped == ["a"]


def test_first_round_is_whole_even_when_there_is_no_time(tmp_path: Path, stopped: list[str]) -> None:
    settings = Settings(cells("a", "b"), 3, 0.01, budget_s=0.0)
    outcome = run(settings, Workspace(tmp_path, 1 << 16), lambda text: None)
    assert [each.system for each in outcome.measurements] == ["a", "b"]
    assert outcome.cut_short.startswith("in round 2 of 3")
    assert sorted(stopped) == ["a", "b"]


def test_everything_is_stopped_when_the_run_is_interrupted(tmp_path: Path, stopped: list[str]) -> None:
    def tell(text: str) -> None:
        if text.startswith("round"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Settings(cells("a", "b"), 3, 0.01), Workspace(tmp_path, 1 << 16), tell)
    assert sorted(stopped) == ["a", "b"]


def test_cpu_of_the_time_without_load_does_not_count(tmp_path: Path) -> None:
    write_image(tmp_path / "image", 1 << 16)
    argv = [sys.executable, "-c", "print('up', flush=True)\nwhile True: pass"]
    with running(argv, tmp_path / "log", pipes=True) as child:
        assert child.read_line(30) == b"up"
        used_s: list[float] = []

        def lag_until_cpu_was_used() -> Lag:
            used_s.append(cpu_s(child.pid))
            return Lag(int(used_s[-1] - used_s[0] < 0.02), 0)

        system = Running(FileTarget(tmp_path / "image"), {"busy": child.pid}, (), lag_until_cpu_was_used)
        whole = runner.measure(WORKS[WORK], "busy", system, 0.01)
        without_idle = runner.measure(WORKS[WORK], "busy", system, 0.01, {"busy": 1000.0})
    assert whole.cpu_s["busy"] > 0
    assert without_idle.cpu_s["busy"] == 0
