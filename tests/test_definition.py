"""Definitions: what a right one gives, and what each wrong one is told."""

from __future__ import annotations

import re
import socket
import uuid
from pathlib import Path

import pytest

from blockrepl.definition import check, load, parse_address, parse_size
from blockrepl.errors import DefinitionError, UsageError

TARGETS = Path(__file__).parent.parent / "targets"
DEMO = TARGETS / "demo.toml"


def changed(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """demo.toml with the first occurrence of each old text replaced."""
    text = DEMO.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    path = tmp_path / "changed.toml"
    path.write_text(text)
    return path


def test_the_demo_has_two_primaries_one_intermediate_two_secondaries_and_volumes_on_each() -> None:
    demo = load(DEMO)
    assert [node.name for node in demo.primaries] == ["p1", "p2"]
    assert demo.intermediate.name == "i1"
    assert [node.name for node in demo.secondaries] == ["s1", "s2"]
    assert [volume.name for volume in demo.volumes_of_primary("p1")] == ["data", "index"]
    assert [volume.name for volume in demo.volumes_of_secondary("s2")] == ["log", "index"]
    assert demo.volume("data").size_bytes == 512 << 20
    assert demo.local_nodes() == demo.nodes
    assert demo.intermediate.address.port == 7110


def test_directories_are_relative_to_the_file_and_not_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(DEMO).node("p1").directory == TARGETS.parent / "images" / "demo" / "p1"


def test_ids_are_places_in_the_file_unless_given(tmp_path: Path) -> None:
    demo = load(changed(tmp_path, ('name = "log"', 'name = "log"\nid = 9')))
    assert [node.id for node in demo.nodes] == [1, 2, 3, 4, 5]
    assert [volume.id for volume in demo.volumes] == [1, 9, 3]


def test_the_group_id_is_derived_from_the_name_or_taken_from_the_file(tmp_path: Path) -> None:
    derived = load(DEMO).group_id
    assert derived == load(changed(tmp_path, ("7110", "7119"))).group_id
    assert derived != load(changed(tmp_path, ('name = "demo"', 'name = "other"'))).group_id
    given = uuid.UUID("8c5e0a51-0f0e-4d0e-9d5f-1f1c9d0a0b01")
    assert load(changed(tmp_path, ("[group]", f'[group]\nid = "{given}"'))).group_id == given


def test_three_sites_belong_to_machines_by_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "munich-2.example.org")
    sites = load(TARGETS / "three-sites.toml")
    assert [node.name for node in sites.local_nodes()] == ["munich-2"]
    assert not sites.volume("scratch").replicated


def test_a_group_of_plain_targets_needs_no_intermediate(tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text(
        '[group]\nname = "plain"\n[[node]]\nname = "p1"\nrole = "primary"\ndirectory = "p1"\n'
        '[[volume]]\nname = "v"\nsize = 4096\nprimary = "p1"\nsecondary = "none"\n'
    )
    plain = load(path)
    assert not plain.replicated
    with pytest.raises(DefinitionError, match="no intermediate"):
        _ = plain.intermediate


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4KiB", 4096),
        ("512 MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("2Ti", 2 << 40),
        ("7B", 7),
    ],
)
def test_sizes_are_integers_or_strings_with_binary_units(text: str | int, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "512MB", "4k", "1.5GiB", "-1", -1, "GiB", True, "4 K iB"])
def test_anything_else_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_addresses_have_a_host_and_a_port() -> None:
    assert (parse_address("10.0.0.1:7100").host, parse_address("10.0.0.1:7100").port) == ("10.0.0.1", 7100)
    assert (parse_address("[::1]:7100").host, parse_address("[::1]:7100").port) == ("::1", 7100)


@pytest.mark.parametrize("text", ["", "host", ":7100", "host:", "host:0", "host:65536", "::1:7100", "a b:1", "h:１"])
def test_anything_else_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|port"):
        parse_address(text)


WRONG = [
    # what is changed in demo.toml, where the problem is, words of the message, words of the hint
    ('size = "512MiB"', 'sise = "512MiB"', "$.volume[0].sise", "unknown key", "did you mean size?"),
    ("[group]", "[grup]", "$.grup", "unknown key", "did you mean group?"),
    ("[group]", "policy = {heartbeat = 1}\n[group]", "$.policy.heartbeat", "unknown key", "heartbeat_s"),
    ("[group]", '"(path)" = "x"\n[group]', "$.(path)", "unknown key", "known here"),
    ("block_size = 4096", 'block_size = "4k"', "$.group.block_size", "must be an integer, is a string", ""),
    ('size = "512MiB"', "size = 1.5", "$.volume[0].size", "integer of bytes", ""),
    ('size = "512MiB"', 'size = "512MB"', "$.volume[0].size", "no size", ""),
    ('size = "512MiB"', "size = 5000", "$.volume[0].size", "no multiple of the block size 4096", "4096 or 8192"),
    ('size = "512MiB"', "size = 0", "$.volume[0].size", "above 0", ""),
    ('size = "512MiB"', 'size = "8192PiB"', "$.volume[0].size", "at most 4 EiB", ""),
    ('name = "data"', 'name = "data"\nlun = true', "$.volume[0].lun", "must be an integer", ""),
    ('name = "data"', 'name = "data"\nfrontends = ["nbb"]', "$.volume[0].frontends[0]", "unknown value", "nbd, loop"),
    ('name = "data"', 'name = "data"\nfrontends = "nbd"', "$.volume[0].frontends", "must be a list", ""),
    ('directory = "../images/demo/p1"', "directory = 3", "$.node[0].directory", "path is a string", ""),
    ('"127.0.0.1:7110"', "7110", "$.node[2].listen", "no address", ""),
    ('role = "primary"', 'role = "primry"', "$.node[0].role", "unknown value", "intermediate, secondary"),
    ("[[node]]", "[node]", ":", "no valid TOML", ""),
    ("[group]", "[group", ":4:7", "no valid TOML", ""),
    ('size = "512MiB"', "size = 512MiB", ":", "no valid TOML", "quotes"),
    ('secondary = "s1"\n', "", "$.volume[0]", "secondary is missing", 'secondary = "none"'),
    ('name = "demo"\n', "", "$.group", "name is missing", "write name"),
    ('secondary = "s1"', 'secondary = "s3"', "$.volume[0].secondary", 'no node "s3"', "s1"),
    ('secondary = "s1"', 'secondary = "p1"', "$.volume[0].secondary", "p1 is a primary, not a secondary", "s1, s2"),
    ('primary = "p1"', 'primary = "i1"', "$.volume[0].primary", "an intermediate, not a primary", "p1, p2"),
    ('name = "p2"', 'name = "p1"', "$.node[1].name", "already taken", ""),
    ('name = "log"', 'name = "data"', "$.volume[1].name", "already taken", ""),
    ('name = "data"', 'name = "data"\nid = 2', "$.volume[1].id", "already taken", ""),
    ('name = "data"', 'name = "data"\nid = 65536', "$.volume[0].id", "65535", ""),
    ("7121", "7110", "$.node[3].listen", "port 7110 is already taken by $.node[2].listen", ""),
    ("127.0.0.1:10811", "0.0.0.0:10810", "$.node[1].nbd", "port 10810 is already taken", ""),
    ("demo/p2", "demo/../demo/p1", "$.node[1].directory", "already taken", ""),
    ('name = "demo"', 'name = "Demo X"', "$.group.name", "no name", '"demo-x"'),
    ('name = "s1"', 'name = "none"', "$.node[3].name", "no secondary", ""),
    ('name = "p1"', 'name = "../p1"', "$.node[0].name", "no name", ""),
    ('role = "intermediate"', 'role = "secondary"', "$.node", "need an intermediate", ""),
    (
        'role = "secondary"\nlisten = "127.0.0.1:7121"\ndirectory = "../images/demo/s1"\nnbd = "127.0.0.1:10821"',
        'role = "intermediate"\nlisten = "127.0.0.1:7121"\ndirectory = "../images/demo/s1"',
        "$.node[3].role", "this is the second", "",
    ),
    ('listen = "127.0.0.1:7110"\n', "", "$.node[2]", "needs an address", "listen ="),
    ('"127.0.0.1:7110"', '"127.0.0.1:7110"\nnbd = "127.0.0.1:1"', "$.node[2].nbd", "no volumes", ""),
    ("block_size = 4096", "block_size = 1000", "$.group.block_size", "512 or 4096", ""),
    ('journal = "256MiB"', 'journal = "512KiB"', "$.group.journal", "at least 1 MiB", ""),
    ('journal = "256MiB"', 'journal = "8MiB"', "$.group.journal", "too small for 2 primaries", "16777216"),
    ('journal = "256MiB"', "journal = 1048577", "$.group.journal", "no multiple of 4096", "1048576"),
    ("[group]", '[group]\nmode = "images"', "$.group.mode", "unknown value", "journal, volumes"),
    ("[group]", '[group]\nbitmap_block = "3KiB"', "$.group.bitmap_block", "power of two", "64KiB"),
    ("[group]", '[group]\nbitmap_block = "2MiB"', "$.group.bitmap_block", "power of two", "64KiB"),
    ("[group]", '[group]\non_full = "wait"', "$.group.on_full", "unknown value", "suspend, block"),
    ("[group]", '[group]\nid = "8c5e"', "$.group.id", "UUID", "leave the id out"),
    ("[group]", "policy = {hold_s = nan}\n[group]", "$.policy.hold_s", "above 0", ""),
    ("[group]", "policy = {link_timeout_s = 1}\n[group]", "$.policy.link_timeout_s", "twice heartbeat_s", ""),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "where", "message", "hint"), WRONG)
def test_a_wrong_definition_is_told_where_it_is_wrong_and_what_to_write(
    tmp_path: Path, old: str, new: str, where: str, message: str, hint: str
) -> None:
    path = changed(tmp_path, (old, new))
    with pytest.raises(DefinitionError) as caught:
        load(path)
    assert caught.value.where.startswith(str(path))
    assert where in caught.value.where
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_check_finds_every_problem_of_meaning_at_once(tmp_path: Path) -> None:
    path = changed(
        tmp_path, ('name = "demo"', 'name = "D"'), ("7121", "7110"), ('secondary = "s1"', 'secondary = "p1"')
    )
    assert [error.where.rpartition(" ")[2] for error in check(path)] == [
        "$.group.name",
        "$.node[3].listen",
        "$.volume[0].secondary",
    ]
    assert check(DEMO) == []


def test_one_machine_may_use_a_port_that_another_uses_too(tmp_path: Path) -> None:
    path = changed(tmp_path, ('name = "s1"', 'name = "s1"\nhost = "elsewhere"'), ("7121", "7110"))
    assert [node.name for node in load(path).local_nodes()] == ["p1", "p2", "i1", "s2"]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="no such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(DefinitionError, match="is a directory"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\n# \xe9\n")
    with pytest.raises(DefinitionError, match=r"latin.toml:2: is not UTF-8"):
        load(tmp_path / "latin.toml")
    (tmp_path / "image.toml").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(DefinitionError, match="larger than 1 MiB"):
        load(tmp_path / "image.toml")


def test_unknown_names_asked_of_a_definition_are_answered_with_those_there_are() -> None:
    demo = load(DEMO)
    with pytest.raises(UsageError, match='no node "p3"') as caught:
        demo.node("p3")
    assert "p1" in caught.value.hint or "p2" in caught.value.hint
    with pytest.raises(UsageError, match='no volume "dta"') as caught:
        demo.volume("dta")
    assert caught.value.hint == "did you mean data?"


ISCSI = (
    '\n[iscsi]\ninitiators = ["iqn.1993-08.org.debian:*"]\n[iscsi.chap]\nusers = [{name = "h", secret_file = "h.s"}]\n'
)


def test_a_group_has_one_iscsi_target_and_each_volume_a_lun_of_its_own(tmp_path: Path) -> None:
    path = changed(
        tmp_path,
        ('nbd = "127.0.0.1:10810"', 'iscsi = "127.0.0.1:3260"'),
        ('nbd = "127.0.0.1:10821"', 'iscsi = ["127.0.0.1:3261", "[::1]:3261"]'),
        ('name = "log"', 'name = "log"\nlun = 7'),
        ("[group]", ISCSI + "\n[group]"),
    )
    found = load(path)
    assert found.target_name == "iqn.2026-11.org.blockrepl:demo"
    assert [found.lun_of(volume) for volume in found.volumes] == [0, 7, 2]
    assert found.node("p1").iscsi == ("127.0.0.1:3260",)
    assert found.node("s1").iscsi == ("127.0.0.1:3261", "[::1]:3261")
    assert found.iscsi.chap is not None
    assert found.iscsi.chap.users[0].secret_file == tmp_path / "h.s"
    assert not found.iscsi.chap.allow_md5
    assert load(
        changed(tmp_path, ("[group]", '[iscsi]\ntarget = "iqn.2001-04.com.example:x"\n[group]'))
    ).target_name == ("iqn.2001-04.com.example:x")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[group]", '[iscsi]\ntarget = "IQN.2001-04.com.example"\n[group]', r"\$.iscsi.target: .* is no iSCSI name"),
        ("[group]", "[iscsi]\nphysical_block = 1024\n[group]", r"\$.iscsi.physical_block: 1024 is not"),
        ("[group]", '[iscsi]\ninitiators = ["a b"]\n[group]', r"\$.iscsi.initiators\[0\]: is no name"),
        ("[group]", "[iscsi.chap]\nusers = []\n[group]", r"\$.iscsi.chap.users: nobody could log in"),
        ("[group]", "[iscsi]\nchap = {}\n[group]", "the key users is missing"),
        (
            "[group]",
            '[iscsi]\nchap = {users = [{name = "a", secret_file = "s"}, {name = "a", secret_file = "s"}]}\n[group]',
            r"users\[1\].name: a stands here twice",
        ),
        (
            "[group]",
            '[iscsi.chap]\nusers = [{name="a", secret_file = "s"}]\nmutual = {name = "b", secret_file = "s"}\n[group]',
            r"mutual.secret_file: is another's secret too",
        ),
        ("[group]", '[iscsi]\nchap = {users = [], secret = "x"}\n[group]', r"\$.iscsi.chap.secret: unknown key"),
        ('nbd = "127.0.0.1:10810"', "iscsi = []", r"\$.node\[0\].iscsi: a node has 1 to 16 portals"),
        ('nbd = "127.0.0.1:10810"', 'iscsi = "3260"', r"\$.node\[0\].iscsi"),
        ('nbd = "127.0.0.1:10810"', 'iscsi = "127.0.0.1:7110"', "port 7110 is already taken"),
        ('listen = "127.0.0.1:7110"', 'listen = "127.0.0.1:7110"\niscsi = "127.0.0.1:3260"', "no volumes to publish"),
        ('name = "log"', 'name = "log"\nlun = 2', r"\$.volume\[2\].lun: 2 is already taken"),
    ],
)
def test_a_wrong_iscsi_key_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    problems = check(changed(tmp_path, (old, new)))
    assert len(problems) >= 1
    assert any(re.search(words, str(problem)) for problem in problems), problems
