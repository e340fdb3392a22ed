"""Groups with an iSCSI target. A module that destroys data makes one of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.iscsi.groups import PlainGroup
from tests.system.conftest import _runtime_dir, make_group

__all__ = ["_runtime_dir", "make_group", "plain"]


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[PlainGroup]:
    """A running node with two plain volumes, reached by one portal."""
    folder = tmp_path / "plain"
    folder.mkdir()
    with PlainGroup(folder) as group:
        group.create()
        group.start()
        yield group
    shutil.rmtree(folder)
