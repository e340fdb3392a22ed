"""What the answers of all nodes say of the group as a whole: its pair state, who is source, how far a resync is."""

from __future__ import annotations

from blockrepl.definition import Definition, Node
from blockrepl.errors import NotRunningError
from blockrepl.node.control_messages import Message

AWAY = ("down", "silent", "elsewhere")


def answering(statuses: list[Message]) -> list[Message]:
    """Those of nodes that run here."""
    return [status for status in statuses if status.get("state") not in AWAY]


def epoch_number(status: Message) -> int:
    """0 for unknown."""
    return int((status.get("epoch") or {}).get("number") or 0)


def sources(statuses: list[Message]) -> list[Message]:
    """The nodes that serve volumes as sources of a copy, those of the newest epoch first."""
    found = [status for status in answering(statuses) if status.get("incarnation") and status["role"] != "intermediate"]
    return sorted(found, key=epoch_number, reverse=True)


def targets(statuses: list[Message]) -> list[Message]:
    """The nodes that are copied to."""
    data = [status for status in answering(statuses) if status["role"] != "intermediate"]
    return [status for status in data if "copying" in status]


def intermediate(statuses: list[Message]) -> Message:
    """Its status; empty when it does not answer."""
    return next((status for status in answering(statuses) if status["role"] == "intermediate"), {})


def group_pair(statuses: list[Message]) -> str:
    """The state of the group: SSWS after a takeover, else what the intermediate keeps; PSUE when nobody can say."""
    middle, served = intermediate(statuses), sources(statuses)
    if served and served[0].get("suspended") == "SSWS" and epoch_number(served[0]) > epoch_number(middle):
        return "SSWS"
    if middle.get("state") == "serving":
        return str(middle.get("pair") or "PSUE")
    told = next((status.get("pair") for status in served if status.get("suspended")), None)
    return str(told or "PSUE")


def group_reason(statuses: list[Message]) -> str:
    """Why, for people."""
    middle = intermediate(statuses)
    if not middle:
        return "the intermediate does not answer"
    return str(middle.get("pair_reason") or middle.get("reason") or "")


def resync_progress(statuses: list[Message]) -> tuple[int, int]:
    """Bytes done and in all, over the sources; (0, 0) when none is under way."""
    running = [status["resync"] for status in sources(statuses) if isinstance(status.get("resync"), dict)]
    done = sum(int(each.get("copied_bytes") or 0) for each in running)
    return done, sum(int(each.get("total_bytes") or 0) for each in running)


def source_to_ask(definition: Definition, statuses: list[Message]) -> Node:
    """A source of the newest epoch that runs here. Raises NotRunningError."""
    found = sources(statuses)
    if not found:
        raise NotRunningError(
            f"no node of this machine serves volumes of {definition.name} as the source of a copy",
            hint="run this where the volumes are served: see `blockrepl status`",
        )
    return definition.node(str(found[0]["node"]))


def target_to_ask(definition: Definition, statuses: list[Message]) -> Node:
    """A target that runs here, to lead a takeover. Raises NotRunningError."""
    found = targets(statuses)
    if not found:
        raise NotRunningError(
            f"no node of this machine is a target of {definition.name}",
            hint="run this at the secondary site; `blockrepl up` starts nodes",
        )
    return definition.node(str(found[0]["node"]))
