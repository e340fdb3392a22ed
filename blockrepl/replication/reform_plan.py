"""What a reform is to do, from what everybody said with its promise; or why it must not be done. Pure.

A reform begins the group anew above a number, with one side as sources and the other as targets: after a takeover to
make the other site the copy (swap), or when the intermediate or a target was replaced by an empty one. What differs
between the sides is known by bits: at the intermediate (hop 2, and what its journal turns into bits), at sources and at
old sources. Where bits are missing everything is compared (`verify`), where a target is empty everything is copied
(`full`) (PROTOCOL, rules 8, 20, 25).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Promises = Mapping[int, dict[str, Any]]
"""Node id → its PROMISED."""


@dataclass(slots=True)
class Plan:
    """What STORE(reform) says. ``number`` is a sequence number, ``full`` are volume ids; sizes in bytes."""

    number: int = 0
    direction: int = 0
    verify: bool = False
    initial: bool = False
    full: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # for verify, initial, full; for people
    dirty_bytes: int = 0  # at most, by the bitmaps of all; a ring's records come on top


@dataclass(slots=True)
class Refused:
    """Why not, and what to type instead."""

    problem: str
    hint: str


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. ``pairs``: volume → (its source, its target); ``replaced``: the node that is new, 0 for none."""

    direction: int
    sources: list[int]
    targets: list[int]
    pairs: dict[int, tuple[int, int]]
    names: dict[int, str]
    replaced: int = 0
    force: bool = False
    verify: bool = False
    planned: bool = False  # a swap of a pair in order: nothing that was completed may be given up


def plan(question: Question, data: Promises, intermediate: dict[str, Any]) -> Plan | Refused:
    """The plan, or what forbids it."""
    refused = _split_brain(question, data, intermediate) or _sources_refused(question, data)
    refused = refused or _alone_refused(question, data) or _nothing_to_do(question, data, intermediate)
    if refused is None and question.replaced:
        refused = _replaced_refused(question, data, intermediate)
    if refused is not None:
        return refused
    made = Plan(direction=question.direction)
    everybody = [*data.values(), intermediate]
    known = ("held", "numbered", "number", "validated", "applied", "copy_from", "end")
    made.number = 1 + max(answer[key] for answer in everybody for key in known)
    made.dirty_bytes = sum(answer["dirty_bytes"] for answer in everybody)
    _decide_verify(question, data, intermediate, made)
    _decide_initial(question, data, made)
    return made


def is_new(answer: dict[str, Any]) -> bool:
    """Whether a node has never worked in an epoch: its files were just made."""
    return bool(answer["stored"].number == 0)


def _name(question: Question, nodes: list[int]) -> str:
    return ", ".join(question.names[node] for node in nodes)


def _split_brain(question: Question, data: Promises, intermediate: dict[str, Any]) -> Refused | None:
    """Two stored epochs of one number (rule 22), or sources that took over each without the other."""
    if question.force:
        return None
    way = "--force forms the group anew from the sources as they are, and gives up what the others have"
    by_number: dict[int, dict[Any, list[int]]] = {}
    for node, answer in [*data.items(), *((n, intermediate) for n in question.names if n not in data)]:
        if answer["stored"].number:
            by_number.setdefault(answer["stored"].number, {}).setdefault(answer["stored"], []).append(node)
    for number, epochs in by_number.items():
        if len(epochs) > 1:
            who = " and ".join(f"{_name(question, nodes)} in {epoch}" for epoch, nodes in sorted(epochs.items()))
            return Refused(f"split brain: two epochs have number {number}: {who}", way)
    for node in question.sources:
        members = data[node]["members"]
        without = [each for each in question.sources if each not in members]
        if node in members and without:
            who = f"{question.names[node]} has taken over without {_name(question, without)}"
            return Refused(f"split brain: {who}: their volumes are at different numbers", way)
    return None


def _sources_refused(question: Question, data: Promises) -> Refused | None:
    idle = [node for node in question.sources if not data[node]["active"]]
    if idle:
        return Refused(
            f"{_name(question, idle)} does not serve its volumes: it is no source",
            "run it at the site that has taken over, or finish the takeover: blockrepl takeover",
        )
    new = [node for node in question.sources if is_new(data[node])]
    if new and len(new) < len(question.sources):
        return Refused(
            f"{_name(question, new)} is new and empty: its volumes cannot be the source",
            f"take over at the other site, then: blockrepl replace --node {question.names[new[0]]}",
        )
    ours = max(data[node]["stored"].number for node in question.sources)
    newer = [node for node in question.targets if data[node]["active"] and data[node]["stored"].number > ours]
    if newer and not question.force:
        epoch = max(data[node]["stored"].number for node in newer)
        return Refused(
            f"{_name(question, newer)} has taken over later, in epoch {epoch}; this side works in {ours}",
            "run it there; --force makes this side the source, and gives up what was written there",
        )
    return None


def _alone_refused(question: Question, data: Promises) -> Refused | None:
    """A planned swap loses nothing; what a primary completed alone in the meantime, it would."""
    alone = [node for node in question.targets if data[node]["active"] and data[node]["alone"]]
    if not alone or not question.planned:
        return None
    return Refused(
        f"{_name(question, alone)} has gone on alone meanwhile: the site that took over lacks what it completed",
        "both sites are as they are: `blockrepl explain` lists those writes, and the two ways on",
    )


def _nothing_to_do(question: Question, data: Promises, intermediate: dict[str, Any]) -> Refused | None:
    everybody = [*data.values(), intermediate]
    agreed = {(answer["stored"], answer["direction"]) for answer in (*_targets(question, data), intermediate)}
    swapped = any(data[node]["active"] for node in question.targets)
    if question.force or swapped or len(agreed) > 1 or any(is_new(answer) for answer in everybody):
        return None
    if next(iter(agreed))[1] != question.direction:
        return None
    return Refused(
        "nothing is to be formed anew: this side is the source already, and all work in one epoch",
        "to swap the sites: blockrepl pair resync --swap; it takes over at the other site first",
    )


def _replaced_refused(question: Question, data: Promises, intermediate: dict[str, Any]) -> Refused | None:
    node = question.replaced
    name = question.names[node]
    answer = data.get(node, intermediate)
    if node in question.sources:
        return Refused(
            f"{name} is the source of its volumes: what replaces it would be empty",
            f"take over at the other site first, then: blockrepl replace --node {name}",
        )
    if is_new(answer) or question.force or (answer["copying"] and answer["initial"]):
        return None
    return Refused(
        f"{name} is not new: it has worked in epoch {answer['stored'].number}",
        f"stop it, move its directory away, `blockrepl create --node {name}`, start it; or `blockrepl pair resync`",
    )


def _targets(question: Question, data: Promises) -> list[dict[str, Any]]:
    return [data[node] for node in question.targets]


def _decide_verify(question: Question, data: Promises, intermediate: dict[str, Any], made: Plan) -> None:
    """The intermediate's journal and bitmap say what a primary forgot; without them every bitmap must be whole."""
    if question.verify:
        made.verify = True
        made.reasons.append("everything is compared, as asked")
        return
    forgetful = [node for node, answer in data.items() if not answer["trusted"] and not is_new(answer)]
    if forgetful and is_new(intermediate):
        made.verify = True
        text = "the intermediate is new, and the bitmaps of {} do not say all: everything is compared"
        made.reasons.append(text.format(_name(question, forgetful)))


def _decide_initial(question: Question, data: Promises, made: Plan) -> None:
    """Whether the targets, together, are at something that can be gone back to."""
    new = [node for node in question.targets if is_new(data[node]) or node == question.replaced]
    made.full = sorted(volume for volume, (_, target) in question.pairs.items() if target in new)
    if new:
        made.initial = True
        made.reasons.append(f"{_name(question, new)} is new: its volumes are copied whole")
        return
    torn = [node for node in question.targets if data[node]["active"] and not data[node]["trusted"]]
    old = [node for node in question.targets if data[node]["active"]]
    rest = [data[node] for node in question.targets if not data[node]["active"]]
    # Behind an END it goes forward, as it must where that is valid: the sources have cleared their bits then.
    inside = [answer for answer in rest if answer["copying"] and not answer["end"]]
    numbers = {answer["copy_from"] if answer in inside else answer["held"] for answer in rest}
    begun = [answer for answer in inside if answer["initial"]]
    if torn:
        why = f"{_name(question, torn)} stopped uncleanly and has not recovered since"
    elif begun:
        why = "the targets were in an initial copy"
    elif (old and rest) or len(numbers) > 1:
        why = "the targets are not at one number"
    else:
        return
    made.initial = True
    made.reasons.append(f"{why}: until the copy has ended there is nothing to go back to")
