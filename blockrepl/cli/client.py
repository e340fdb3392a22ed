"""Asks a node through its control socket. Synchronous: a command line waits anyway."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from blockrepl.errors import EnvironmentLacksError, NotRunningError, ProtocolError, TimeoutExpiredError
from blockrepl.node.control_messages import MAX_LINE_BYTES, SOCKET_NAME, VERSION, Message, decode, encode, error_from

ANSWER_LIMIT_BYTES = 16 * MAX_LINE_BYTES


def call(
    directory: Path,
    command: str,
    args: Message | None = None,
    on_progress: Callable[[Message], None] | None = None,
    timeout_s: float | None = 10.0,
) -> Message:
    """The result of ``command`` at the node that lives in ``directory``.

    ``timeout_s`` is how long the node may say nothing, None for any time. Raises NotRunningError when no node answers,
    TimeoutExpiredError when it is silent, and else the error that the node answers with.
    """
    with connect(directory, timeout_s) as sock:
        try:
            sock.sendall(encode({"v": VERSION, "command": command, "args": args or {}}))
            for line in _lines(sock):
                message = decode(line)
                if "error" in message:
                    raise error_from(message["error"])
                if isinstance(result := message.get("result"), dict):
                    return result
                if on_progress is not None and isinstance(progress := message.get("progress"), dict):
                    on_progress(progress)
        except TimeoutError:
            raise TimeoutExpiredError(
                f"{directory / SOCKET_NAME}: no answer to {command} for {timeout_s:g} s", hint=_log_hint(directory)
            ) from None
        except ConnectionError:
            pass
    raise NotRunningError(f"{directory}: the node ended before it answered {command}", hint=_log_hint(directory))


def is_running(directory: Path) -> bool:
    """True when a process listens on the control socket, whether it answers or not."""
    try:
        connect(directory, 1.0).close()
    except (NotRunningError, EnvironmentLacksError):
        return False
    except TimeoutExpiredError:
        return True
    return True


def connect(directory: Path, timeout_s: float | None) -> socket.socket:
    """A connection to the node's control socket. Raises NotRunningError, or what keeps us from it."""
    path = directory / SOCKET_NAME
    try:
        directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        raise EnvironmentLacksError(f"{directory}: permission denied", hint="run this as the node's user") from None
    except OSError as error:
        raise NotRunningError(
            f"{directory}: {error.strerror}", hint="`blockrepl create` makes it, `blockrepl up` starts the node"
        ) from None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}")
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise EnvironmentLacksError(f"{path}: permission denied", hint="run this as the node's user") from None
        if isinstance(error, TimeoutError | BlockingIOError):
            raise TimeoutExpiredError(f"{path}: the node accepts no connection", hint=_log_hint(directory)) from None
        raise NotRunningError(f"{directory}: no node runs here", hint="`blockrepl up` starts it") from None
    finally:
        os.close(directory_fd)
    return sock


def _lines(sock: socket.socket) -> Iterator[bytes]:
    buffer = bytearray()
    while data := sock.recv(1 << 16):
        buffer += data
        while (end := buffer.find(b"\n")) >= 0:
            yield bytes(buffer[:end])
            del buffer[: end + 1]
        if len(buffer) > ANSWER_LIMIT_BYTES:
            raise ProtocolError("the node's answer has no end")


def _log_hint(directory: Path) -> str:
    return f"see {directory / 'node.log'}"
