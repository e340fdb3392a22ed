"""Real groups for tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.system.group import RealGroup

MakeGroup = Callable[..., RealGroup]


@pytest.fixture(autouse=True)
def _runtime_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves a note in this machine's registry of groups."""
    monkeypatch.setenv("BLOCKREPL_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))


@pytest.fixture
def make_group(tmp_path: Path) -> Iterator[MakeGroup]:
    """Makes groups; everything of them is stopped and removed at the end."""
    with ExitStack() as stack:

        def make(**how: Any) -> RealGroup:
            folder = tmp_path / f"group{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            stack.callback(shutil.rmtree, folder)
            return stack.enter_context(RealGroup(folder, **how))

        yield make


@pytest.fixture
def group(make_group: MakeGroup) -> RealGroup:
    """A running one."""
    return make_group().create().start()


@pytest.fixture
def fio() -> None:
    """Skips without it."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
