"""The control socket of a node: where the command line asks and commands.

Unix socket addresses are limited to 108 bytes and directories are not, so both ends go through
``/proc/self/fd/N/control.sock`` of the open directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

from blockrepl.errors import InUseError, ProtocolError, StorageError
from blockrepl.node.control_messages import MAX_LINE_BYTES, SOCKET_NAME, Message, encode, error_message, parse_request

BACKLOG = 64
PROGRESS_BACKLOG_BYTES = 1 << 16  # progress is dropped while this much waits for a slow reader
GRACE_S = 5.0  # for answers under way when the server closes

Progress = Callable[[Message], None]
Handler = Callable[[Message, Progress], Awaitable[Message]]

log = logging.getLogger(__name__)


class ControlServer:
    """Serves ``control.sock`` (mode 0600) in a node's directory; the node holds the directory's lock.

    ``handlers`` maps a command to ``async (args, progress) -> result``; what it raises becomes the answer, a
    BlockreplError with its hint and exit code. A handler runs to its end even when its client goes away, except those
    named in ``cancellable``: half an attach or half a takeover helps nobody, the rest of a verify is only work.
    """

    def __init__(
        self, directory: Path, handlers: Mapping[str, Handler], *, cancellable: Collection[str] = ("verify",)
    ) -> None:
        self._directory = directory
        self._handlers = handlers
        self._cancellable = frozenset(cancellable)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._busy: set[asyncio.Task[None]] = set()
        self._inode = 0

    async def start(self) -> None:
        """Listen; replaces the socket that a killed node left. Raises InUseError when another process answers there."""
        sock = _listen(self._directory)
        self._inode = (self._directory / SOCKET_NAME).stat().st_ino
        # asyncio would resolve and compare the long path of a Unix server; a ready socket it takes as it is.
        self._server = await asyncio.start_unix_server(self._connected, sock=sock, limit=MAX_LINE_BYTES)

    async def close(self) -> None:
        """Accept no more, let answers under way end (at most GRACE_S), remove the socket."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        path = self._directory / SOCKET_NAME
        with contextlib.suppress(OSError):
            if path.stat().st_ino == self._inode:
                path.unlink()
        own = asyncio.current_task()
        for task in self._connections - self._busy - {own}:
            task.cancel()
        busy = self._busy - {own}
        if busy:
            await asyncio.wait(busy, timeout=GRACE_S)
        rest = self._connections - {own}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=GRACE_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(task, reader, writer)
        except ConnectionError:
            pass  # the client went away; what it asked for has been done
        except asyncio.CancelledError:
            pass  # by close(): the task ends here anyway
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Requests of one connection, one after the other."""
        line: bytes | None = await _read_line(reader)
        while line != b"":
            if line is None:
                error = ProtocolError(f"a request is at most {MAX_LINE_BYTES} bytes long")
                writer.write(encode(error_message(error)))
                await writer.drain()
                return
            self._busy.add(task)
            following = asyncio.ensure_future(_read_line(reader))
            try:
                answer = await self._answer(line, writer, following)
                writer.write(answer)
                await writer.drain()
                self._busy.discard(task)
                if self._server is None:
                    return
                line = await following
            finally:
                self._busy.discard(task)
                following.cancel()

    async def _answer(
        self, line: bytes, writer: asyncio.StreamWriter, following: asyncio.Future[bytes | None]
    ) -> bytes:
        """Run one request. ``following`` ends with b"" when the client goes away."""

        def progress(message: Message) -> None:
            if writer.transport.get_write_buffer_size() < PROGRESS_BACKLOG_BYTES and not writer.is_closing():
                writer.write(encode({"progress": message}))

        try:
            command, args = parse_request(line, self._handlers)
            work = asyncio.ensure_future(self._handlers[command](args, progress))
            if command in self._cancellable:
                await asyncio.wait((work, following), return_when=asyncio.FIRST_COMPLETED)
                if not work.done() and following.result() == b"":
                    work.cancel()
            return encode({"result": await work})
        except asyncio.CancelledError:
            raise ConnectionAbortedError from None
        except Exception as error:
            answer = error_message(error)
            if answer["error"]["kind"] == "InternalError":
                log.exception("control command failed")
            return encode(answer)


async def _read_line(reader: asyncio.StreamReader) -> bytes | None:
    """A line, b"" at the end (a cut last line counts as that), None for one that is too long."""
    try:
        line = await reader.readline()
    except ValueError:
        return None
    except ConnectionError:
        return b""
    return line if line.endswith(b"\n") else b""


def _listen(directory: Path) -> socket.socket:
    """A listening socket under its final name, never visible with a wider mode than 0600."""
    try:
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"{directory}: cannot be opened: {error.strerror}") from error
    try:
        _refuse_living(directory, directory_fd)
        fresh = f".{SOCKET_NAME}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=directory_fd)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(sock.fileno(), 0o600)  # bind(2) takes the mode of the unbound socket (net/unix/af_unix.c)
            sock.bind(f"/proc/self/fd/{directory_fd}/{fresh}")
            sock.listen(BACKLOG)
            os.rename(fresh, SOCKET_NAME, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise StorageError(f"{directory / SOCKET_NAME}: {error.strerror}") from error
    finally:
        os.close(directory_fd)


def _refuse_living(directory: Path, directory_fd: int) -> None:
    """Raise InUseError when something other than the socket of a dead process has our name."""
    path = directory / SOCKET_NAME
    try:
        mode = os.stat(SOCKET_NAME, dir_fd=directory_fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InUseError(f"{path}: is no socket", hint="move it away: the node needs that name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}")
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return
            if error.errno != errno.EAGAIN:  # a full backlog: alive
                raise
    raise InUseError(f"{path}: another process answers here", hint="the node already runs: see `blockrepl status`")
