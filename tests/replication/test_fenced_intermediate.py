"""An intermediate whose secondaries have taken over."""

from __future__ import annotations

from blockrepl.formats.link import LinkRole, Message, Refusal
from blockrepl.replication.actions import Close
from tests.replication.roles import MID, NONCE, S1, S2, TWO, arrives, hello, intermediate, saved, serving


def test_an_opener_that_waits_for_the_drain_is_let_go_when_the_intermediate_learns_that_it_is_fenced() -> None:
    """A second takeover right after the first: the drain can never end, and the opener must not wait for it."""
    role = serving(intermediate())
    role.accepted(7, hello(LinkRole.OPENER, S1, MID), 0.0)
    for node in (S1, S2):  # they took over, and closed
        role.lost(100 + node, 0.0)
    saved(role, role.received(7, Message.PROMISE, arrives(Message.PROMISE, epoch=TWO, dry_run=False), 0.0))
    role.connected(200, S2, NONCE, 0.0)
    fields = {"code": Refusal.ACTIVE, "epoch": TWO, "promised": TWO, "text": "s2 has taken over"}
    actions = role.received(200, Message.REFUSED, fields, 0.0)
    closed = {action.link: action for action in actions if isinstance(action, Close)}
    assert "taken over" in closed[7].reason
    assert closed[7].last_words
