"""Whose HELLO a secondary takes: its intermediate's, unless that is behind, and openers' (rules 1, 22 to 25)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockrepl.formats.link import LinkRole, Refusal
from blockrepl.replication.greeting import Problem

if TYPE_CHECKING:
    from blockrepl.replication.secondary import Secondary

OPENERS = (LinkRole.OPENER, LinkRole.REFORMER)


def problem_with(role: Secondary, fields: dict[str, Any]) -> Problem | None:
    """What is wrong with a HELLO of this group that is meant for this secondary; None when it is to be welcomed."""
    if role.reason:
        return Refusal.STATE, role.reason
    if fields["role"] in OPENERS:
        if fields["node"] not in role.peers:
            return Refusal.NODE, f"node {fields['node']} opens no epochs in this group"
        return None
    return _problem_with_intermediate(role, fields)


def _problem_with_intermediate(role: Secondary, fields: dict[str, Any]) -> Problem | None:
    epoch, ours = fields["epoch"], role.state.epoch
    if fields["role"] != LinkRole.INTERMEDIATE or fields["node"] != role.intermediate:
        return Refusal.ROLE, f"node {fields['node']} is not this group's intermediate"
    if epoch.number == ours.number and epoch.id != ours.id and not role.state.active:
        return Refusal.EPOCH, f"split brain: epoch {epoch} there, {ours} here"
    if role.state.active and epoch.number <= ours.number:  # with a higher one it is we who are behind
        return Refusal.ACTIVE, f"{role.name} has taken over in epoch {ours.number}"
    # One that replaces a lost intermediate counts from 1 again; a reform has brought it into a higher epoch.
    if fields["incarnation"] < role.incarnation and epoch.number <= role.greeted_epoch:
        return Refusal.STALE, f"incarnation {fields['incarnation']} is dead, {role.incarnation} lives"
    return None
