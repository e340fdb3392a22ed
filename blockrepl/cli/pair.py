"""``pair`` and ``node``: create, split, resync, swap, delete, wait; exclude and include."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from blockrepl.cli.asking import PATIENT_S, STATUS_TIMEOUT_S, node_statuses
from blockrepl.cli.client import call
from blockrepl.cli.groups import group_pair, group_reason, intermediate, resync_progress, source_to_ask, target_to_ask
from blockrepl.cli.losses import what_is_lost
from blockrepl.cli.output import bytes_text, console, error_console, print_json
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.definition import Definition, Node, parse_size
from blockrepl.errors import UsageError
from blockrepl.node.control_messages import Message

SILENCE_S = 180.0  # a node at work says something at least this often
POLL_S = 0.2
REHEARSALS = 5
# As pairevtwait of Hitachi's CCI gives them: its timeout, and with -nowait the state. SSWS is ours.
WAIT_TIMEOUT_CODE = 233
STATE_CODES = {"SMPL": 1, "COPY": 2, "PAIR": 3, "PSUS": 4, "PSUE": 5, "PFUL": 7, "PFUS": 8, "SSWS": 9}

app = typer.Typer(help="Pair states: create, split, resync, swap, delete, wait.", no_args_is_help=True)
node_app = typer.Typer(help="Primaries that are known to be dead.", no_args_is_help=True)
Rate = Annotated[
    str | None, typer.Option("--rate", metavar="SIZE", help="Copy at most so much a second, such as 50MiB.")
]


@app.callback()
def pair() -> None:
    """Pair states: create, split, resync, swap, delete, wait."""


@node_app.callback()
def node() -> None:
    """Primaries that are known to be dead."""


@app.command("create")
def pair_create(
    target: Target = None,
    file: File = None,
    no_copy: Annotated[
        bool, typer.Option("--no-copy", help="Both ends are the same already: copy nothing. You answer for that.")
    ] = False,
    rate: Rate = None,
    as_json: Json = False,
) -> None:
    """Copy everything for the first time, while hosts write.

    Of a pair in SMPL, or of adopted images.
    """
    _ask(find(target, file), "pair_create", {"no_copy": no_copy, "rate_bytes": _rate(rate)}, as_json)


@app.command("split")
def pair_split(
    target: Target = None,
    file: File = None,
    writable: Annotated[bool, typer.Option("--rw", help="Hosts may write the S-VOLs, too.")] = False,
    as_json: Json = False,
) -> None:
    """Stop the copy at one number, on purpose (PSUS)."""
    _ask(find(target, file), "pair_split", {"writable": writable}, as_json)


@app.command("resync")
def pair_resync(
    target: Target = None,
    file: File = None,
    swap: Annotated[bool, typer.Option("--swap", help="The other way: the old primaries become the copy.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Trust no bitmap: compare all, copy what differs.")] = False,
    rate: Rate = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --swap: say what would be done.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --swap: though the other site is newer.")] = False,
    as_json: Json = False,
) -> None:
    """Copy what the bitmaps say, then replicate again.

    With --swap the sites change roles: after a takeover, or in one go (it takes over first).
    """
    definition = find(target, file)
    if swap:
        _swap(definition, verify=verify, dry_run=dry_run, force=force, as_json=as_json)
    elif dry_run or force:
        raise UsageError("--dry-run and --force belong to --swap", hint="write: blockrepl pair resync --swap")
    else:
        _ask(definition, "pair_resync", {"verify": verify, "rate_bytes": _rate(rate)}, as_json)


@app.command("delete")
def pair_delete(target: Target = None, file: File = None, as_json: Json = False) -> None:
    """End the copy: the secondaries keep what they have (SMPL)."""
    _ask(find(target, file), "pair_delete", {}, as_json)


@app.command("wait")
def pair_wait(
    states: Annotated[
        str, typer.Option("-s", "--state", metavar="STATE", help="PAIR, PSUS, COPY …; several with commas.")
    ] = "PAIR",
    target: Target = None,
    file: File = None,
    timeout_s: Annotated[float, typer.Option("-t", "--timeout", metavar="SECONDS", help="At most so long.")] = 3600,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Only say the state, by exit code.")] = False,
    as_json: Json = False,
) -> None:
    """Wait until the pair is in a state.

    Exit 0: it is; 233: not in time. With --no-wait 1 SMPL, 2 COPY, 3 PAIR, 4 PSUS, 5 PSUE, 7 PFUL, 8 PFUS, 9 SSWS.
    """
    wanted = [each.strip().upper() for each in states.split(",")]
    unknown = [each for each in wanted if each not in STATE_CODES]
    if unknown:
        raise UsageError(f'"{unknown[0]}" is no pair state', hint=f"states are {', '.join(STATE_CODES)}")
    definition = find(target, file)
    if no_wait:
        statuses = node_statuses(definition, PATIENT_S)
        _tell_state(definition, statuses, as_json)
        raise typer.Exit(STATE_CODES[group_pair(statuses)])
    raise typer.Exit(_wait(definition, wanted, timeout_s, as_json))


@node_app.command("exclude")
def node_exclude(
    name: Annotated[str, typer.Argument(metavar="NODE", help="A primary that is known to be dead.")],
    target: Target = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Let the others go on without a primary that is known to be dead."""
    definition = find(target, file)
    _ask(definition, "exclude", {"node": definition.node(name).name}, as_json)


@node_app.command("include")
def node_include(
    name: Annotated[str, typer.Argument(metavar="NODE", help="A primary that was excluded.")],
    target: Target = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Let an excluded primary back in."""
    definition = find(target, file)
    _ask(definition, "include", {"node": definition.node(name).name}, as_json)


def _rate(text: str | None) -> int:
    if text is None:
        return 0
    try:
        return int(parse_size(text))
    except ValueError as error:
        raise UsageError(f"--rate: {error}") from None


def _ask(definition: Definition, command: str, args: Message, as_json: bool) -> None:
    """The intermediate decides; a state that forbids the command is its error, with what comes first."""
    result = call(_intermediate(definition).directory, command, args, timeout_s=SILENCE_S)
    if as_json:
        print_json({"schema": 1, "group": definition.name, **result})
        return
    console().print(f"{definition.name}: {result.get('pair')}, {result.get('step')}")


def _intermediate(definition: Definition) -> Node:
    found = definition.intermediate
    if found not in definition.local_nodes():
        raise UsageError(
            f"the intermediate {found.name} belongs on {found.host}, not on this machine", hint="run this there"
        )
    return found


def _swap(definition: Definition, *, verify: bool, dry_run: bool, force: bool, as_json: bool) -> None:
    statuses = node_statuses(definition, PATIENT_S)
    pair = group_pair(statuses)
    planned = pair in ("PAIR", "PFUL")
    if not planned and pair != "SSWS" and not force and intermediate(statuses).get("state") == "serving":
        reason = group_reason(statuses)
        raise UsageError(
            f"pair resync --swap is not possible in state {pair}{f' ({reason})' if reason else ''}",
            hint="in PAIR it loses nothing; how to come there: blockrepl explain",
        )
    if planned:
        leader = target_to_ask(definition, statuses)
        lost = _lossless(leader)
        if dry_run:
            out = {"schema": 1, "group": definition.name, "dry_run": True, "takeover": lost}
            print_json(out) if as_json else console().print(
                f"{definition.name}: would take over and swap, losing nothing"
            )
            return
        call(leader.directory, "takeover", {"planned": True}, on_progress=_teller(leader), timeout_s=SILENCE_S)
        statuses = node_statuses(definition, PATIENT_S)
    asked = {"kind": "swap", "verify": verify, "dry_run": dry_run, "force": force, "planned": planned}
    reform(definition, statuses, asked, as_json)


def _lossless(leader: Node) -> Message:
    """A takeover's rehearsal. Raises UsageError when it would lose something.

    An intermediate that just said PAIR lives, and may be busy: it is asked again.
    """
    for turn in range(REHEARSALS):
        time.sleep(POLL_S * turn)
        lost = call(leader.directory, "takeover", {"dry_run": True, "planned": True}, timeout_s=SILENCE_S)
        if lost.get("lossless"):
            return lost
        if not lost.get("without"):
            what = "; ".join(what_is_lost(lost))
            raise UsageError(f"a swap loses nothing, and a takeover now loses {what}", hint="see: blockrepl status")
    raise UsageError(
        f"a swap loses nothing, but {leader.name} does not reach the intermediate ({lost['without']})",
        hint="start it; or take over without it: blockrepl takeover",
    )


def _teller(node: Node) -> Callable[[Message], None]:
    screen = error_console()
    return lambda progress: screen.print(f"{node.name}: {progress.get('step')}")


def reform(definition: Definition, statuses: list[Message], args: Message, as_json: bool) -> None:
    """Have a source form the group anew, and tell what came of it."""
    source = source_to_ask(definition, statuses)
    result = call(source.directory, "reform", args, on_progress=_teller(source), timeout_s=SILENCE_S)
    if as_json:
        print_json(result)
        return
    out = console()
    would = "would copy" if result.get("dry_run") else "copy"
    out.print(
        f"{definition.name}: {', '.join(result['sources'])} {would} to {', '.join(result['targets'])}, "
        f"above number {result['number']}, epoch {(result.get('epoch') or {}).get('number')}"
    )
    out.print(f"out of sync by the bitmaps: at most {bytes_text(result.get('out_of_sync_bytes'))}")
    for reason in result.get("reasons") or []:
        out.print(reason)
    if not result.get("dry_run"):
        out.print("wait for it: blockrepl pair wait -s PAIR")


def _wait(definition: Definition, wanted: list[str], timeout_s: float, as_json: bool) -> int:
    deadline_s = time.monotonic() + timeout_s
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), console=error_console(),
        transient=True, disable=not error_console().is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(definition.name, total=None)
        while True:
            left_s = deadline_s - time.monotonic()
            statuses = node_statuses(definition, min(PATIENT_S, max(STATUS_TIMEOUT_S, left_s)))
            state = group_pair(statuses)
            done_bytes, total_bytes = resync_progress(statuses)
            bar.update(task, description=f"{definition.name} {state}", completed=done_bytes, total=total_bytes or None)
            if state in wanted:
                break
            if time.monotonic() >= deadline_s:
                break
            time.sleep(min(POLL_S, max(0.0, deadline_s - time.monotonic())))
    _tell_state(definition, statuses, as_json)
    return 0 if state in wanted else WAIT_TIMEOUT_CODE


def _tell_state(definition: Definition, statuses: list[Message], as_json: bool) -> None:
    state, reason = group_pair(statuses), group_reason(statuses)
    if as_json:
        print_json({"schema": 1, "group": definition.name, "pair": state, "reason": reason})
    else:
        console().print(f"{definition.name}: {state}{f' ({reason})' if reason else ''}")
