"""What a definition says of its iSCSI target, and what may be wrong in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from blockrepl.definition.values import Address

NAME_PREFIX = "iqn.2026-11.org.blockrepl:"
NAME_PATTERN = re.compile(
    r"iqn\.[0-9]{4}-[0-9]{2}\.[a-z0-9.:-]+|eui\.[0-9A-F]{16}|naa\.(?:[0-9A-F]{16}|[0-9A-F]{32})"
)  # RFC 7143, 4.2.7, in the normal form of RFC 3722
MAX_NAME_BYTES = 223
MAX_USER_BYTES = 255
MAX_PORTALS = 16

Problem = tuple[str, str, str]  # where, message, hint


class Portals(tuple[Address, ...]):
    """One address, or a list of them. They are one portal group."""


class ChapUser(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name and the file of its secret, which is 0600."""

    name: str
    secret_file: Path


class Chap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``users`` may log in; ``mutual`` is who we are to initiators that ask."""

    users: tuple[ChapUser, ...]
    mutual: ChapUser | None = None
    allow_md5: bool = False


class Iscsi(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The target of the group. ``initiators`` are globs of names; without them only loopback is let in.

    ``physical_block`` is what initiators are told of the medium: 0 is the group's block size.
    """

    target: str | None = None
    physical_block: int = 0
    initiators: tuple[str, ...] | None = None
    chap: Chap | None = None


def iscsi_problems(iscsi: Iscsi) -> Iterator[Problem]:
    """What is wrong in the table ``[iscsi]``."""
    name = iscsi.target
    if name is not None and (len(name.encode()) > MAX_NAME_BYTES or NAME_PATTERN.fullmatch(name) is None):
        hint = f'write target = "{NAME_PREFIX}demo", or leave the key out'
        yield "iscsi.target", f'"{name}" is no iSCSI name in lower case (iqn., eui. or naa.)', hint
    if iscsi.physical_block not in (0, 512, 4096):
        yield "iscsi.physical_block", f"{iscsi.physical_block} is not 512 or 4096", "or leave the key out"
    for place, pattern in enumerate(iscsi.initiators or ()):
        if not pattern or re.search(r"\s", pattern):
            hint = 'write the name of an initiator, such as "iqn.1993-08.org.debian:*"'
            yield f"iscsi.initiators[{place}]", "is no name of an initiator", hint
    if iscsi.chap is not None:
        yield from _chap_problems(iscsi.chap)


def _chap_problems(chap: Chap) -> Iterator[Problem]:
    example = 'write users = [{name = "host1", secret_file = "host1.secret"}]'
    if not chap.users:
        yield "iscsi.chap.users", "nobody could log in", example
    named = [(f"iscsi.chap.users[{place}]", user) for place, user in enumerate(chap.users)]
    if chap.mutual is not None:
        named.append(("iscsi.chap.mutual", chap.mutual))
    names: set[str] = set()
    files: set[Path] = set()
    for at, user in named:
        if not 0 < len(user.name.encode()) <= MAX_USER_BYTES or "\0" in user.name:
            yield f"{at}.name", "a name has 1 to 255 bytes", ""
        if user.name in names and at != "iscsi.chap.mutual":
            yield f"{at}.name", f"{user.name} stands here twice", "give each user a name of its own"
        if user.secret_file in files:
            yield f"{at}.secret_file", "is another's secret too", "give each a secret of its own (RFC 7143, 9.2.1)"
        names.add(user.name)
        files.add(user.secret_file)
