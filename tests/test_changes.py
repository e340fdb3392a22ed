"""What a running group can be changed to, and what is refused: one row for each difference a file can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockrepl.definition import Configuration, Definition, configuration_from, configuration_of, load
from blockrepl.definition.changes import Plan, differs, fixed_facts, plan, size_text
from blockrepl.errors import DamagedError, DefinitionError

TEXT = """
[group]
name = "g"

[[node]]
name = "p1"
role = "primary"
directory = "p1"

[[node]]
name = "p2"
role = "primary"
directory = "p2"

[[node]]
name = "i1"
role = "intermediate"
directory = "i1"
listen = "127.0.0.1:1"

[[node]]
name = "s1"
role = "secondary"
directory = "s1"
listen = "127.0.0.1:2"

[[volume]]
name = "data"
size = "64MiB"
primary = "p1"
secondary = "s1"

[[volume]]
name = "log"
size = "64MiB"
primary = "p2"
secondary = "s1"
"""
DATA = 'name = "data"\nsize = "64MiB"\nprimary = "p1"\nsecondary = "s1"\n'
LOG = '[[volume]]\nname = "log"\nsize = "64MiB"\nprimary = "p2"\nsecondary = "s1"\n'


def written(folder: Path, text: str) -> Definition:
    path = folder / "g.toml"
    path.write_text(text)
    return load(path)


def planned(folder: Path, old: str, new: str) -> Plan:
    running = written(folder, TEXT)
    assert old in TEXT
    return plan(written(folder, TEXT.replace(old, new, 1)), configuration_of(running), fixed_facts(running))


def test_the_same_file_changes_nothing(tmp_path: Path) -> None:
    found = planned(tmp_path, "", "")
    assert (found.changes, found.problems, found.notes) == ([], [], [])


def test_a_larger_volume_is_a_change(tmp_path: Path) -> None:
    found = planned(tmp_path, "64MiB", "1GiB")
    assert [(each.what, each.kind, each.text) for each in found.changes] == [
        ("volume data", "grow", "grows from 64 MiB to 1 GiB")
    ]
    assert found.problems == []


def test_rings_may_be_larger_or_smaller(tmp_path: Path) -> None:
    found = planned(tmp_path, '"g"\n', '"g"\njournal = "128MiB"\nsecondary_journal = "1GiB"\n')
    assert found.problems == []
    assert [(each.what, each.text) for each in found.changes] == [
        ("the intermediate's journal", "has a ring of 128 MiB instead of 256 MiB"),
        ("every other journal", "has a ring of 1 GiB instead of 256 MiB"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "where", "words", "hint"),
    [
        ("64MiB", "32MiB", "$.volume[0].size", "data has 64 MiB, not 32 MiB", 'write size = "64MiB"'),
        (DATA, DATA.replace("p1", "p2"), "$.volume[0].primary", "is p1, not p2", 'write primary = "p1"'),
        (DATA, DATA.replace('"s1"', '"none"'), "$.volume[0].secondary", "is s1, not none", 'write secondary = "s1"'),
        (DATA, DATA.replace("data", "date"), "$.volume[0]", "has no volume date", "leave it out"),
        (LOG, "", "$.volume", "volume log of the running group is missing", "write it back"),
        (LOG, LOG + "id = 7\n", "$.volume[1].id", "log is number 2 in the running group", "write id = 2"),
        ('"g"\n', '"g"\nblock_size = 512\n', "$.group.block_size", "is 4096 in the running group, not 512",
         "write block_size = 4096"),
        ('"g"\n', '"g"\nbitmap_block = "128KiB"\n', "$.group.bitmap_block", "is 65536", "write bitmap_block = 65536"),
        ('"g"\n', '"h"\n', "$.group.name", "is g in the running group, not h", "write name = 'g'"),
        ('name = "p2"', 'name = "p9"', "$.node[1].name", "node 2 of the running group is called p2, not p9",
         'write name = "p2"'),
        ('name = "i1"', 'name = "i1"\nid = 9', "$.node[2].id", "node i1 has id 3 in the running group", "write id = 3"),
        (LOG, '[[node]]\nname = "p3"\nrole = "primary"\ndirectory = "p3"\n' + LOG, "$.node[4]",
         "the running group has no node p3", "blockrepl down"),
    ],
)  # fmt: skip
def test_what_cannot_change_is_told_with_place_and_remedy(
    tmp_path: Path, old: str, new: str, where: str, words: str, hint: str
) -> None:
    if "p9" in new:  # its volume follows, so that the file by itself is right
        old, new = TEXT, TEXT.replace(old, new).replace('primary = "p2"', 'primary = "p9"')
    found = planned(tmp_path, old, new)
    told = next(problem for problem in found.problems if problem.where.endswith(where))
    assert words in str(told)
    assert hint in told.hint


def test_a_place_in_the_file_gives_numbers_and_luns_that_may_not_shift(tmp_path: Path) -> None:
    running = written(tmp_path, TEXT)
    swapped = TEXT.replace(LOG, "").replace('[[volume]]\nname = "data"', LOG + '\n[[volume]]\nname = "data"')
    found = plan(written(tmp_path, swapped), configuration_of(running), fixed_facts(running))
    assert {problem.hint for problem in found.problems} == {
        "write id = 1", "write lun = 0", "write id = 2", "write lun = 1",
    }  # fmt: skip


def test_what_is_read_at_a_start_is_noted(tmp_path: Path) -> None:
    found = planned(tmp_path, '"g"\n', '"g"\nfence = "never"\n')
    assert found.problems == []
    assert found.notes == ["fence is 'data' in the running nodes and 'never' in the file: restart the nodes"]


def test_a_node_runs_by_what_it_keeps_and_takes_the_rest_from_the_file(tmp_path: Path) -> None:
    kept = configuration_of(written(tmp_path, TEXT))
    file = written(tmp_path, TEXT.replace(DATA, DATA.replace("64MiB", "1GiB") + 'frontends = ["nbd"]\n'))
    runs = kept.applied_to(file)
    assert runs.volume("data").size_bytes == 64 << 20
    assert runs.volume("data").frontends == ("nbd",)
    assert differs(kept, file) == ["volume data grows from 64 MiB to 1 GiB"]
    assert differs(configuration_of(file), file) == []


def test_a_node_whose_file_lacks_a_node_that_it_works_with_does_not_start(tmp_path: Path) -> None:
    kept = configuration_of(written(tmp_path, TEXT))
    file = written(tmp_path, TEXT.replace('"p2"', '"p9"'))
    with pytest.raises(DefinitionError, match="there is no node p2, but volume log of the running group lies there"):
        kept.applied_to(file)


def test_the_digest_is_that_of_what_all_must_agree_on(tmp_path: Path) -> None:
    kept = configuration_of(written(tmp_path, TEXT))
    same = configuration_of(written(tmp_path, TEXT.replace(DATA, DATA + 'frontends = ["nbd"]\nlun = 9\n')))
    larger = configuration_of(written(tmp_path, TEXT.replace("64MiB", "65MiB", 1)))
    assert kept.digest == same.digest != larger.digest
    assert 0 < kept.digest < 1 << 63


def test_garbage_is_no_configuration() -> None:
    with pytest.raises(DamagedError, match="not a configuration"):
        configuration_from({"journal": "x"})
    assert isinstance(configuration_from({"journal": 1, "secondary_journal": 1, "volumes": []}), Configuration)


@pytest.mark.parametrize(
    ("size", "text"), [(4096, "4 KiB"), (1 << 40, "1 TiB"), (3 << 29, "1536 MiB"), (513, "513 bytes")]
)
def test_sizes_are_told_as_a_file_writes_them(size: int, text: str) -> None:
    assert size_text(size) == text
