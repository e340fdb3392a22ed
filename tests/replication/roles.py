"""Roles as the tests of `replication` want them, and what they say in words."""

from __future__ import annotations

from typing import Any

from blockrepl.block import Op, WriteBatch
from blockrepl.chunks import Chunk
from blockrepl.formats.link import DEFAULTS, Epoch, LinkRole, Message, decode_body, decode_header
from blockrepl.formats.record import RecordHead, RecordKind, decode_batch, decode_record, encode_record, number_record
from blockrepl.formats.state import IntermediateState, PrimaryState, SecondaryState
from blockrepl.replication.actions import Action, Send
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.policy import Policy
from blockrepl.replication.primary import Primary
from blockrepl.replication.secondary import Secondary

GROUP = bytes(range(16))
P1, P2, MID, S1, S2 = 1, 2, 3, 4, 5
ONE = Epoch(1, b"1" * 16)
TWO = Epoch(2, b"2" * 16)
THREE = Epoch(3, b"3" * 16)
NONCE = b"n" * 16
POLICY = Policy()
FREE = 1 << 20


def primary(**state: Any) -> Primary:
    """P1, with volume 1 on S1 and volume 2 on S2."""
    return Primary(
        group=GROUP, node=P1, name="p1", intermediate=MID, streams={1: S1, 2: S2},
        state=PrimaryState(**{"incarnation": 1, **state}), policy=POLICY,
    )  # fmt: skip


def intermediate(free_bytes: int = FREE, **state: Any) -> Intermediate:
    """I, in epoch 1 unless told otherwise."""
    role = Intermediate(
        group=GROUP, node=MID, name="i", primaries=[P1, P2], secondaries=[S1, S2],
        state=IntermediateState(**{"epoch": ONE, "promised": ONE, "incarnation": 1, **state}), policy=POLICY,
        new_id=lambda: b"x" * 16,
    )  # fmt: skip
    role.ring(free_bytes)
    return role


def secondary(node: int = S1, **state: Any) -> Secondary:
    """A secondary in epoch 1."""
    role = Secondary(
        group=GROUP, node=node, name=f"s{node - 3}", intermediate=MID, peers=[S1, S2],
        state=SecondaryState(**{"epoch": ONE, "promised": ONE, **state}), policy=POLICY,
    )  # fmt: skip
    role.free_bytes = FREE
    return role


def words(actions: list[Action]) -> list[str]:
    """The names of actions; messages by their own names."""
    return [Message(message[1]).name if message else type(action).__name__ for action in actions
            for message in [said(action)]]  # fmt: skip


def said(action: Action) -> tuple[int, int, dict[str, Any]] | None:
    """(link, message type, fields) of a Send of a control message; bulk has no fields."""
    if not isinstance(action, Send):
        return None
    data = b"".join(action.buffers)
    view = memoryview(data)
    head = decode_header(view)
    fields = {} if head.type in (Message.BATCH, Message.RECORD) else decode_body(head, view)
    return action.link, head.type, fields


def messages(actions: list[Action]) -> list[tuple[int, int, dict[str, Any]]]:
    """All messages among actions."""
    return [message for message in map(said, actions) if message is not None]


def one(actions: list[Action], kind: int) -> dict[str, Any]:
    """The fields of the only message of a kind."""
    found = [fields for _, each, fields in messages(actions) if each == kind]
    assert len(found) == 1, f"{Message(kind).name}: {len(found)} in {words(actions)}"
    return found[0]


def hello(role: LinkRole, node: int, peer: int, **fields: Any) -> dict[str, Any]:
    """A HELLO's fields."""
    return {
        "version_min": 1, "version_max": 1, "role": role, "features": 0, "group": GROUP, "node": node, "peer": peer,
        "incarnation": 1, "nonce": NONCE, "epoch": ONE, "promised": ONE, "highest": 0, "checkpoint": 0, "fresh": False,
        "name": "peer", **DEFAULTS[Message.HELLO], **fields,
    }  # fmt: skip


def report(node: int, **fields: Any) -> dict[str, Any]:
    """A secondary's WELCOME."""
    return {
        "version": 1, "role": LinkRole.SECONDARY, "features": 0, "node": node, "nonce": NONCE, "epoch": ONE,
        "promised": ONE, "through": 0, "batch": 0, "credit": FREE, "validated": 0, "prepared": 0, "applied": 0,
        "active": False, **DEFAULTS[Message.WELCOME], **fields,
    }  # fmt: skip


def welcome(**fields: Any) -> dict[str, Any]:
    """The intermediate's WELCOME to a primary."""
    return report(MID, **{"role": LinkRole.INTERMEDIATE, **fields})


def write(size_bytes: int = 512, offset: int = 0) -> WriteBatch:
    """A batch of one write."""
    batch = WriteBatch(lambda _: None)
    for column, value in (
        (batch.ops, Op.WRITE), (batch.offsets, offset), (batch.lengths, size_bytes), (batch.flags, 0),
        (batch.cookies, 0),
    ):  # fmt: skip
        column.append(int(value))
    batch.payloads.append(memoryview(bytes(size_bytes)))
    batch.size_bytes = size_bytes
    return batch


def raw_batch(
    batch: int, sender: int = P1, stream: int = S1, incarnation: int = 1, size_bytes: int = 512
) -> tuple[Chunk, int]:
    """A record as a primary sends it, in a chunk, and its size."""
    head, size = encode_record(
        RecordKind.UPDATE, GROUP, sender, stream, incarnation, batch, 1, [Op.WRITE], [0], [0], [size_bytes],
        [bytes(size_bytes)], size_bytes,
    )  # fmt: skip
    chunk = Chunk(size, None)
    chunk.view[:] = bytes(head) + bytes(size_bytes)
    return chunk, size


def send_batch(role: Intermediate, link: int, batch: int, **fields: Any) -> list[Action]:
    """A batch arrives at the intermediate."""
    chunk, size = raw_batch(batch, **fields)
    return role.batch(link, decode_batch(chunk.view), chunk, 0, size, 0.0, 0)


def numbered(first: int, previous: int, stream: int = S1, epoch: int = 1) -> tuple[RecordHead, memoryview, Chunk]:
    """A record as the intermediate sends it on."""
    chunk, _ = raw_batch(first, stream=stream)
    number_record(chunk.view, 0, epoch, first, previous, 0)
    return decode_record(chunk.view), chunk.view, chunk


def serving(role: Intermediate, **both: Any) -> Intermediate:
    """Both secondaries greet, on links 104 and 105: the intermediate serves."""
    for node in (S1, S2):
        role.connected(100 + node, node, NONCE, 0.0)
        role.received(100 + node, Message.WELCOME, report(node, **both), 0.0)
    return role


def greet(role: Intermediate, link: int, node: int = P1, **fields: Any) -> list[Action]:
    """A primary greets; what is to be saved first is."""
    actions = role.accepted(link, hello(LinkRole.PRIMARY, node, MID, **fields), 0.0)
    return actions + saved(role, actions)


def live(role: Primary, link: int = 1, credit: int = FREE, **fields: Any) -> Primary:
    """A started primary is welcomed, replays nothing, and is live."""
    role.connected(link, NONCE, 0.0)
    saved(role, role.received(link, Message.WELCOME, welcome(credit=credit, **fields), 0.0))
    actions = role.received(link, Message.REPLAYED, {"through": 0}, 0.0)
    actions = role.volumes_synced(actions[0].token, 0.0)  # type: ignore[union-attr]
    saved(role, actions)
    return role


def saved(role: Any, actions: list[Action]) -> list[Action]:
    """Everything that `actions` ask to be saved is."""
    done: list[Action] = []
    for action in actions:
        if type(action).__name__ == "SaveState":
            done += role.saved(action.token, 0.0)  # type: ignore[union-attr]
    return done


def arrives(kind: int, **given: Any) -> dict[str, Any]:
    """The fields of a message as they arrive: those not given are as its sender leaves them."""
    return {**DEFAULTS.get(kind, {}), **given}
