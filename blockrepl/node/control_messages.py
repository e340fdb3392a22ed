"""What goes over a control socket: JSON lines, the same for the node and for the command line.

A request is ``{"v": 1, "command": …, "args": {…}}``. It is answered by any number of ``{"progress": {…}}`` and one
``{"result": {…}}`` or ``{"error": {"kind", "message", "hint", "exit_code"}}``. A connection may carry several requests,
one after the other. The commands and their results are described in docs/control.md.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from typing import Any

import msgspec

from blockrepl import errors
from blockrepl.errors import BlockreplError, ProtocolError, RefusedError, UsageError

VERSION = 1
SOCKET_NAME = "control.sock"
MAX_LINE_BYTES = 1 << 20

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """One line."""
    return msgspec.json.encode(message, enc_hook=plain) + b"\n"


def plain(value: Any) -> Any:
    """For JSON: sizes, addresses and paths as the integer or string they are."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str | os.PathLike):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def decode(line: bytes) -> Message:
    """A line as a JSON object. Raises ProtocolError."""
    try:
        message = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"no JSON: {error}") from None
    except RecursionError:
        raise ProtocolError("no JSON: nested too deeply") from None
    if not isinstance(message, dict):
        raise ProtocolError("a message is a JSON object")
    return message


def parse_request(line: bytes, commands: Collection[str]) -> tuple[str, Message]:
    """The command and its arguments. Raises ProtocolError, RefusedError or UsageError."""
    example = 'such as {"v": 1, "command": "status", "args": {}}'
    try:
        message = decode(line)
    except ProtocolError as error:
        raise ProtocolError(str(error), hint=f"a request is one line, {example}") from None
    if message.get("v") != VERSION or isinstance(message["v"], bool):
        raise RefusedError(
            f"control protocol version {message.get('v')!r} is not spoken here, only {VERSION}",
            hint="use the blockrepl command of the version that the node runs",
        )
    if unknown := sorted(set(message) - {"v", "command", "args"}):
        raise ProtocolError(f"unknown key {unknown[0]!r} in a request", hint=f"a request is one line, {example}")
    command, args = message.get("command"), message.get("args", {})
    if not isinstance(command, str) or not isinstance(args, dict):
        raise ProtocolError("command is a string and args an object", hint=f"a request is one line, {example}")
    if command not in commands:
        near = difflib.get_close_matches(command, commands, 1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(sorted(commands))}"
        raise UsageError(f"this node knows no command {command[:64]!r}", hint=hint)
    return command, args


def error_message(error: BaseException) -> Message:
    """The answer for an exception; one that nobody expected is called an internal error."""
    if isinstance(error, BlockreplError):
        kind, text, hint, code = type(error).__name__, str(error), error.hint, error.exit_code
    else:
        kind, text = "InternalError", f"internal error: {type(error).__name__}: {error}"
        hint, code = "the node's log (node.log in its directory) has the traceback", BlockreplError.exit_code
    return {"error": {"kind": kind, "message": text, "hint": hint, "exit_code": code}}


def error_from(answer: Any) -> BlockreplError:
    """The exception that `error_message` told of, of the same class where its class takes just a message."""
    fields = answer if isinstance(answer, dict) else {}
    kind = getattr(errors, str(fields.get("kind")), None)
    simple = (
        isinstance(kind, type)
        and issubclass(kind, BlockreplError)
        and not issubclass(kind, errors.DefinitionError | errors.BlockError)
    )
    error = (kind if simple and kind is not None else BlockreplError)(
        str(fields.get("message", "the node failed without saying why")), hint=str(fields.get("hint", ""))
    )
    code = fields.get("exit_code")
    if isinstance(code, int) and 0 < code < 126:
        error.exit_code = code
    return error
