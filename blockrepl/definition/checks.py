"""What is wrong in a definition that has the right shape."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence

from blockrepl.definition.iscsi import MAX_PORTALS, Problem, iscsi_problems
from blockrepl.definition.model import NO_SECONDARY, Definition, Node, Role
from blockrepl.definition.shape import EXAMPLES
from blockrepl.definition.values import Address
from blockrepl.errors import DefinitionError

NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
MIN_JOURNAL_BYTES = 1 << 20
RING_PER_PRIMARY_BYTES = 8 << 20  # see node.base.max_write_bytes
MIN_BITMAP_BLOCK_BYTES, MAX_BITMAP_BLOCK_BYTES = 4 << 10, 1 << 20
MAX_VOLUME_BYTES = 1 << 62  # offsets are signed 64 bits in every system call
MAX_ID = (1 << 16) - 1


def problems(definition: Definition, path: str) -> Iterator[DefinitionError]:
    """Every problem of a definition that has the right shape, in file order of the tables."""
    for checker in (_group_problems, _policy_problems, _iscsi_problems, _node_problems, _volume_problems):
        for at, message, hint in checker(definition):
            yield DefinitionError(f"{path}: $.{at}", message, hint=hint)


def _group_problems(definition: Definition) -> Iterator[Problem]:
    group = definition.group
    yield from _name_problems("group.name", group.name)
    if group.block_size not in (512, 4096):
        yield "group.block_size", f"must be 512 or 4096, is {group.block_size}", "write block_size = 4096"
    for key, size in (("journal", group.journal), ("secondary_journal", group.secondary_journal)):
        if size < MIN_JOURNAL_BYTES:
            yield f"group.{key}", f"a journal has at least 1 MiB, this has {size} bytes", f'write {key} = "256MiB"'
        elif size % 4096:
            yield f"group.{key}", f"{size} bytes is no multiple of 4096", f"write {key} = {size // 4096 * 4096}"
        elif definition.replicated and size < (least := RING_PER_PRIMARY_BYTES * max(2, len(definition.primaries))):
            yield (
                f"group.{key}",
                f"{size} bytes are too small for {_primaries(definition)}, whose writes may be 1 MiB long",
                f'write {key} = "256MiB"; at least {least} bytes',
            )
    block = group.bitmap_block
    if not MIN_BITMAP_BLOCK_BYTES <= block <= MAX_BITMAP_BLOCK_BYTES or block & (block - 1):
        text = f"must be a power of two from 4 KiB to 1 MiB, is {block} bytes"
        yield "group.bitmap_block", text, 'write bitmap_block = "64KiB", or leave it out'


def _primaries(definition: Definition) -> str:
    count = len(definition.primaries)
    return f"{count} primaries" if count != 1 else "a primary"


def _policy_problems(definition: Definition) -> Iterator[Problem]:
    policy = definition.policy
    for key in ("heartbeat_s", "link_timeout_s", "hold_s", "lease_s", "checkpoint_s"):
        value = getattr(policy, key)
        if not math.isfinite(value) or value <= 0:
            yield f"policy.{key}", f"must be a number of seconds above 0, is {value}", ""
    if not math.isfinite(policy.round_s) or policy.round_s < 0:
        yield "policy.round_s", f"must be a number of seconds, 0 or more, is {policy.round_s}", ""
    if policy.link_timeout_s < 2 * policy.heartbeat_s:
        hint = f"write link_timeout_s = {5 * policy.heartbeat_s}"
        yield "policy.link_timeout_s", "must be at least twice heartbeat_s, or a healthy link is dropped", hint
    for key in ("checkpoint_bytes", "round_bytes"):
        if getattr(policy, key) < 4096:
            yield f"policy.{key}", f"must be at least 4096 bytes, is {getattr(policy, key)}", f'write {key} = "8MiB"'


def _iscsi_problems(definition: Definition) -> Iterator[Problem]:
    return iscsi_problems(definition.iscsi)


def _node_problems(definition: Definition) -> Iterator[Problem]:
    nodes = definition.nodes
    for place, node in enumerate(nodes):
        at = f"node[{place}]"
        yield from _name_problems(f"{at}.name", node.name)
        if node.name == NO_SECONDARY:
            yield f"{at}.name", '"none" stands for no secondary, so no node can have this name', "choose another name"
        if not node.host or re.search(r"\s", node.host):
            yield f"{at}.host", "must be a host name", 'write host = "local" for this machine'
        if node.role != "primary" and node.listen is None:
            yield at, f"the {node.role} {node.name} needs an address for its links", 'write listen = "127.0.0.1:7110"'
        if node.role == "intermediate" and node.nbd is not None and not definition.volumes_mode:
            hint = 'leave the key nbd out, or write mode = "volumes" under [group]'
            yield f"{at}.nbd", "an intermediate in journal mode has no volumes to export", hint
        if node.role == "intermediate" and node.iscsi is not None:
            yield f"{at}.iscsi", "an intermediate has no volumes to publish", "leave the key iscsi out"
        if node.iscsi is not None and not 0 < len(node.iscsi) <= MAX_PORTALS:
            hint = 'write iscsi = "127.0.0.1:3260", or leave the key out'
            yield f"{at}.iscsi", f"a node has 1 to {MAX_PORTALS} portals, not {len(node.iscsi)}", hint
    yield from _duplicates("node", "name", [node.name for node in nodes])
    yield from _id_problems("node", [node.id for node in nodes])
    yield from _duplicates("node", "directory", [(node.host, str(node.directory)) for node in nodes])
    yield from _address_problems(nodes)
    intermediates = [place for place, node in enumerate(nodes) if node.role == "intermediate"]
    if len(intermediates) > 1:
        yield f"node[{intermediates[1]}].role", "a group has one intermediate, this is the second", "leave one out"
    if not definition.primaries:
        yield "node", "a group needs at least one primary", EXAMPLES["node"]
    if definition.replicated and not intermediates:
        yield "node", "volumes with a secondary need an intermediate", 'add a [[node]] with role = "intermediate"'


def _volume_problems(definition: Definition) -> Iterator[Problem]:
    volumes, block = definition.volumes, definition.group.block_size
    block = block if block in (512, 4096) else 1  # a wrong one is reported once
    if not volumes:
        yield "volume", "a group needs at least one volume", EXAMPLES["volume"]
    for place, volume in enumerate(volumes):
        at = f"volume[{place}]"
        yield from _name_problems(f"{at}.name", volume.name)
        if not 0 < volume.size <= MAX_VOLUME_BYTES:
            yield f"{at}.size", f"must be above 0 and at most 4 EiB, is {volume.size} bytes", EXAMPLES["size"]
        elif volume.size % block:
            down = volume.size // block * block
            hint = f"write size = {down} or {down + block}" if down else f"write size = {block}"
            yield f"{at}.size", f"{volume.size} bytes is no multiple of the block size {block}", hint
        yield from _place_problems(definition, f"{at}.primary", volume.primary, "primary")
        if volume.replicated:
            yield from _place_problems(definition, f"{at}.secondary", volume.secondary, "secondary")
        if len(set(volume.frontends)) < len(volume.frontends):
            yield f"{at}.frontends", "a front end stands here twice", 'write frontends = ["nbd", "loop"]'
        if volume.lun is not None and not 0 <= volume.lun <= 255:
            yield f"{at}.lun", f"must be from 0 to 255, is {volume.lun}", ""
    yield from _duplicates("volume", "name", [volume.name for volume in volumes])
    yield from _id_problems("volume", [volume.id for volume in volumes])
    yield from _duplicates("volume", "lun", [definition.lun_of(volume) for volume in volumes])


def _name_problems(at: str, name: str) -> Iterator[Problem]:
    if not NAME_PATTERN.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-")
        hint = f'write "{near}"' if near else ""
        yield at, f'"{name}" is no name: lower case letters, digits and inner hyphens, 1 to 32 of them', hint


def _place_problems(definition: Definition, at: str, name: str, role: Role) -> Iterator[Problem]:
    fitting = [node.name for node in definition.nodes if node.role == role]
    choice = f"{role} nodes: {', '.join(fitting)}" if fitting else f'add a [[node]] with role = "{role}"'
    for node in definition.nodes:
        if node.name == name:
            if node.role != role:
                yield at, f"the node {name} is {_article(node.role)}, not {_article(role)}", choice
            return
    near = difflib.get_close_matches(name, fitting, 1)
    yield at, f'there is no node "{name}"', f"did you mean {near[0]}?" if near else choice


def _id_problems(table: str, ids: Sequence[int]) -> Iterator[Problem]:
    for place, number in enumerate(ids):
        if not 1 <= number <= MAX_ID:
            yield f"{table}[{place}].id", f"must be from 1 to {MAX_ID}, is {number}", ""
    yield from _duplicates(table, "id", ids)


def _duplicates(table: str, key: str, values: Sequence[object]) -> Iterator[Problem]:
    first: dict[object, int] = {}
    for place, value in enumerate(values):
        if value in first:
            shown = value[-1] if isinstance(value, tuple) else value
            text = f"{shown} is already taken by $.{table}[{first[value]}].{key}"
            yield f"{table}[{place}].{key}", text, f"give each {table} a {key} of its own"
        else:
            first[value] = place


def _address_problems(nodes: Sequence[Node]) -> Iterator[Problem]:
    """Two listeners on one machine need two ports, unless they bind different addresses of it."""
    taken: list[tuple[str, Address, str]] = []
    for place, node in enumerate(nodes):
        portals = [("iscsi", portal) for portal in node.iscsi or ()]
        for key, address in (("listen", node.listen), ("nbd", node.nbd), *portals):
            if address is None:
                continue
            at = f"node[{place}].{key}"
            for host, other, where in taken:
                if host == node.host and other.port == address.port and _may_collide(other.host, address.host):
                    yield at, f"port {address.port} is already taken by $.{where} ({other})", "choose another port"
                    break
            taken.append((node.host, address, at))


def _may_collide(one: str, other: str) -> bool:
    return one == other or not {one, other}.isdisjoint(("0.0.0.0", "::", "*"))


def _article(role: str) -> str:
    return f"an {role}" if role == "intermediate" else f"a {role}"
