"""docs/states.md is what the tables in the code say."""

from __future__ import annotations

from tests.states import DOCUMENT, MACHINES, draw


def test_the_document_is_drawn_from_the_code() -> None:
    assert DOCUMENT.read_text() == draw(), "run scripts/states"


def test_every_machine_is_drawn() -> None:
    from blockrepl import replication

    directory = DOCUMENT.parent.parent / "blockrepl" / "replication"
    with_table = {path.stem for path in directory.glob("*.py") if "\nTABLE" in path.read_text()}
    assert with_table == {module for module, _, _ in MACHINES}
    assert replication.__doc__
