"""The file `config` of a node: prepared, in effect, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from blockrepl.definition import Definition, configuration_of, load
from blockrepl.errors import DamagedError
from blockrepl.node.config_file import CONFIG_NAME, ConfigFile
from tests.test_changes import TEXT


@pytest.fixture
def definition(tmp_path: Path) -> Definition:
    path = tmp_path / "g.toml"
    path.write_text(TEXT)
    found = load(path)
    found.node("p1").directory.mkdir()
    return found


def reopened(definition: Definition) -> ConfigFile:
    return ConfigFile.open(definition, definition.node("p1"))


def larger(definition: Definition) -> Definition:
    definition.path.write_text(TEXT.replace("64MiB", "128MiB", 1))
    return load(definition.path)


def test_a_node_without_one_runs_as_the_file_says(definition: Definition) -> None:
    assert reopened(definition).effective == configuration_of(definition)


def test_what_is_prepared_is_not_in_effect_until_it_is_taken(definition: Definition) -> None:
    ConfigFile.create(definition, definition.node("p1"))
    new = larger(definition)
    file = reopened(new)
    assert file.effective == configuration_of(definition), "the file does not change it"
    file.prepare(configuration_of(new))
    file = reopened(new)
    assert (file.effective, file.held) == (configuration_of(definition), configuration_of(new))
    assert not file.take(1, 5), "another's"
    assert file.take(configuration_of(new).digest, 5)
    file = reopened(new)
    assert (file.effective, file.prepared, file.number) == (configuration_of(new), None, 5)
    assert not file.take(configuration_of(new).digest, 9), "it is in effect already"


def test_what_is_in_effect_is_not_prepared(definition: Definition) -> None:
    ConfigFile.create(definition, definition.node("p1"))
    file = reopened(definition)
    file.prepare(configuration_of(larger(definition)))
    file.prepare(configuration_of(definition))
    assert file.prepared is None


@pytest.mark.parametrize("at", [0, 20, -2])
def test_a_damaged_one_stops_the_node(definition: Definition, at: int) -> None:
    path = ConfigFile.create(definition, definition.node("p1"))
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedError, match="damaged"):
        reopened(definition)


def test_one_of_another_version_is_refused(definition: Definition) -> None:
    from crc32c import crc32c

    raw = msgspec.json.encode({"version": 99})
    (definition.node("p1").directory / CONFIG_NAME).write_bytes(raw + b"\n%08x\n" % crc32c(raw))
    with pytest.raises(DamagedError, match="version 99"):
        reopened(definition)
