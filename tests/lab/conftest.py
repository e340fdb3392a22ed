"""One guest for all tests of the lab: booting costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import initramfs, packages
from tests.lab.guest import Guest

# pytest finds fixtures by name here; a group is what these tests need beside the guest.
from tests.system.conftest import _runtime_dir, make_group

__all__ = ["_runtime_dir", "guest", "make_group"]


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A running guest; skips with the reason where there is none."""
    reason = packages.reason_against()
    if reason is not None:
        pytest.skip(f"kernel lab: {reason}")
    try:
        kernel, root = initramfs.ready()
        with Guest(kernel, root, tmp_path_factory.mktemp("guest")) as running:
            yield running
    except packages.LabUnavailableError as error:
        pytest.skip(f"kernel lab: {error}")
