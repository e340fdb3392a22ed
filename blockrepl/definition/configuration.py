"""What of a definition can change while the group runs: a value that each node keeps durably, and that wins over the
file until `blockrepl adjust` has brought both together (PROTOCOL, rule 26; ARCHITECTURE, "Changing a running group").
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from blockrepl.definition.model import NO_SECONDARY, Definition, Frontend, Volume
from blockrepl.definition.values import Size
from blockrepl.errors import DamagedError, DefinitionError

DIGEST_BITS = 63  # it travels in the entry of a record


class VolumeRow(msgspec.Struct, frozen=True):
    """A volume as a node runs it. ``frontends`` and ``lun`` are the file's where it still has the volume."""

    id: int
    name: str
    size: int
    primary: str
    secondary: str
    frontends: tuple[Frontend, ...]
    lun: int

    @property
    def replicated(self) -> bool:
        """It has a pair."""
        return self.secondary != NO_SECONDARY


class Configuration(msgspec.Struct, frozen=True):
    """Sizes in bytes. Two configurations are the same when their `digest` is: it is what the config record names."""

    journal: int
    secondary_journal: int
    volumes: tuple[VolumeRow, ...]

    @property
    def digest(self) -> int:
        """Of what the whole group must agree on; never 0."""
        rows = sorted((row.id, row.name, row.size, row.primary, row.secondary) for row in self.volumes)
        raw = msgspec.json.encode([self.journal, self.secondary_journal, rows])
        return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") >> (64 - DIGEST_BITS) or 1

    def volume(self, number: int) -> VolumeRow | None:
        """By id."""
        return next((row for row in self.volumes if row.id == number), None)

    def applied_to(self, definition: Definition) -> Definition:
        """The definition that a node runs by. Raises DefinitionError where the file lacks a node of a volume."""
        names = {node.name for node in definition.nodes} | {NO_SECONDARY}
        for row in self.volumes:
            if lost := {row.primary, row.secondary} - names:
                raise DefinitionError(
                    f"{definition.path}: $.node",
                    f"there is no node {min(lost)}, but volume {row.name} of the running group lies there",
                    hint="write it back: a node of a running group cannot be renamed or left out",
                )
        group = msgspec.structs.replace(
            definition.group, journal=Size(self.journal), secondary_journal=Size(self.secondary_journal)
        )
        known = {volume.name: volume for volume in definition.volumes}
        volumes = tuple(_volume(row, known.get(row.name)) for row in self.volumes)
        return msgspec.structs.replace(definition, group=group, volumes=volumes)


def _volume(row: VolumeRow, written: Volume | None) -> Volume:
    lun, frontends = row.lun, row.frontends
    if written is not None:
        lun, frontends = row.lun if written.lun is None else written.lun, written.frontends
    return Volume(row.name, Size(row.size), row.primary, row.secondary, frontends, lun, row.id)


def configuration_of(definition: Definition) -> Configuration:
    """What a new group begins with, or what a file asks for."""
    rows = tuple(
        VolumeRow(
            volume.id, volume.name, volume.size_bytes, volume.primary, volume.secondary, volume.frontends,
            definition.lun_of(volume),
        )
        for volume in definition.volumes
    )  # fmt: skip
    return Configuration(int(definition.group.journal), int(definition.group.secondary_journal), rows)


def configuration_from(value: Any) -> Configuration:
    """From JSON values. Raises DamagedError."""
    try:
        return msgspec.convert(value, Configuration)
    except msgspec.ValidationError as error:
        raise DamagedError(f"not a configuration: {error}") from None
