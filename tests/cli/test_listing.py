"""``ls`` of a group with an iSCSI target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockrepl.cli import listing
from blockrepl.definition import load

GROUP = """
[group]
name = "g"
[[node]]
name = "p"
role = "primary"
directory = "p"
iscsi = ["127.0.0.1:7401", "127.0.0.2:7401"]
[[volume]]
name = "data"
size = "1MiB"
primary = "p"
secondary = "none"
lun = 4
"""


def test_target_portals_paths_and_sessions_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.toml"
    path.write_text(GROUP)
    url = "iscsi://127.0.0.1:7401/iqn.2026-11.org.blockrepl:g/4"
    entry = {"url": url, "lun": 4, "state": "active/optimized"}
    sessions = [
        {"frontend": "iscsi", "peer": "127.0.0.1:5", "initiator": "iqn.x", "requests": 7, "in_flight": 1},
        {"frontend": "nbd", "peer": "unix", "volume": "data", "requests": 3, "in_flight": 0},
    ]  # fmt: skip
    volume = {"name": "data", "active": True, "attached": None, "iscsi": entry}
    status: dict[str, Any] = {"node": "p", "state": "serving", "volumes": [volume], "sessions": sessions}
    monkeypatch.setattr(listing, "node_statuses", lambda definition: [status])
    monkeypatch.setenv("COLUMNS", "200")
    group = listing.describe(load(path))
    assert group["target"] == {
        "name": "iqn.2026-11.org.blockrepl:g",
        "portals": [
            {"node": "p", "address": "127.0.0.1:7401", "tag": 1}, {"node": "p", "address": "127.0.0.2:7401", "tag": 1},
        ],
    }  # fmt: skip
    assert group["volumes"][0]["exports"] == [url]
    assert group["volumes"][0]["paths"] == {"p": "active/optimized"}
    assert group["sessions"] == [{"node": "p", **session} for session in sessions]
    listing.print_listing([group])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["iqn.2026-11.org.blockrepl:g", "p", "1", "127.0.0.2:7401", "4=data", "(active/optimized)"] in lines
    assert ["iscsi", "p", "127.0.0.1:5", "iqn.x", "7", "1"] in lines
    assert ["nbd", "p", "unix", "data", "3", "0"] in lines
