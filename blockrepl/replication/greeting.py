"""HELLO, WELCOME and REFUSED: what every role says and checks when a link begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockrepl.formats.link import (
    FEATURES,
    NO_EPOCH,
    VERSION_MAX,
    VERSION_MIN,
    Epoch,
    LinkRole,
    Message,
    Refusal,
    encode,
)

Problem = tuple[Refusal, str]


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who this end is."""

    group: bytes
    node: int
    name: str
    role: LinkRole

    def hello(
        self, peer: int, nonce: bytes, *, epoch: Epoch = NO_EPOCH, promised: Epoch = NO_EPOCH, incarnation: int = 0,
        highest: int = 0, checkpoint: int = 0, fresh: bool = False, **more: Any,
    ) -> bytes:  # fmt: skip
        """To the node that was dialled. ``nonce``: 16 random bytes, which its WELCOME echoes."""
        return encode(
            Message.HELLO, epoch.number, version_min=VERSION_MIN, version_max=VERSION_MAX, role=self.role,
            features=FEATURES, group=self.group, node=self.node, peer=peer, incarnation=incarnation, nonce=nonce,
            epoch=epoch, promised=promised, highest=highest, checkpoint=checkpoint, fresh=fresh, name=self.name, **more,
        )  # fmt: skip

    def welcome(
        self, hello: dict[str, Any], *, epoch: Epoch, promised: Epoch, through: int, batch: int = 0, credit: int = 0,
        validated: int = 0, prepared: int = 0, applied: int = 0, active: bool = False, **more: Any,
    ) -> bytes:  # fmt: skip
        """The answer to a HELLO that was found right. ``more``: fields that only some roles fill."""
        return encode(
            Message.WELCOME, epoch.number, version=VERSION_MAX, role=self.role, features=FEATURES & hello["features"],
            node=self.node, nonce=hello["nonce"], epoch=epoch, promised=promised, through=through, batch=batch,
            credit=credit, validated=validated, prepared=prepared, applied=applied, active=active, **more,
        )  # fmt: skip

    def check(self, hello: dict[str, Any]) -> Problem | None:
        """What is wrong with a HELLO whoever sent it: version, group, or meant for somebody else."""
        if hello["version_min"] > VERSION_MAX or hello["version_max"] < VERSION_MIN:
            return Refusal.VERSION, f"this end speaks link versions {VERSION_MIN} to {VERSION_MAX}"
        if hello["group"] != self.group:
            return Refusal.GROUP, f"{self.name} belongs to another group"
        if hello["peer"] != self.node:
            return Refusal.NODE, f"this is node {self.node}, not {hello['peer']}"
        return None


def refused(code: Refusal, text: str, *, epoch: Epoch, promised: Epoch) -> bytes:
    """Last words on a link; they name our epochs, so that an idle peer learns of them."""
    return encode(Message.REFUSED, epoch.number, code=code, epoch=epoch, promised=promised, text=text)
