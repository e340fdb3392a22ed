"""docs/claims.md names tests; a name that nobody runs proves nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/claims.md").read_text())))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_the_claims_name_exists(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    assert re.search(rf"^(async )?(def|class) {name}\b|^{name} = ", text, re.MULTILINE)


def test_every_claim_has_a_row() -> None:
    rows = [line.split("|")[1] for line in (ROOT / "docs/claims.md").read_text().splitlines() if line.startswith("| ")]
    numbers = {int(number) for row in rows for number in re.findall(r"\d+", row)}
    assert numbers == set(range(1, 24))
