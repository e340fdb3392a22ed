"""The control socket: what is answered to what, and who may ask."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from blockrepl.cli.client import call, is_running
from blockrepl.errors import (
    BlockreplError,
    DefinitionError,
    EpochError,
    InUseError,
    NotRunningError,
    StorageError,
    TimeoutExpiredError,
    UsageError,
)
from blockrepl.node.control import ControlServer, Progress
from blockrepl.node.control_messages import MAX_LINE_BYTES

Message = dict[str, Any]


class Commands:
    """Handlers that show what reaches them; ``gate`` holds the slow ones."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()
        self.finished = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def echo(self, args: Message, progress: Progress) -> Message:
        for step in range(args.get("steps", 0)):
            progress({"step": step})
        return {"args": args}

    async def refuse(self, args: Message, progress: Progress) -> Message:
        raise EpochError("epoch 7 exists", hint="look at status")

    async def misread(self, args: Message, progress: Progress) -> Message:
        raise DefinitionError("demo.toml: $.node", "is wrong", hint="write it right")

    async def fail(self, args: Message, progress: Progress) -> Message:
        raise ZeroDivisionError("nobody expected this")

    async def slow(self, args: Message, progress: Progress) -> Message:
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        self.finished.set()
        return {"slow": True}

    def table(self) -> dict[str, Any]:
        names = ("echo", "refuse", "misread", "fail", "slow")
        return {name: getattr(self, name) for name in names} | {"verify": self.slow}


@pytest.fixture
def commands() -> Commands:
    return Commands()


@pytest.fixture
async def server(tmp_path: Path, commands: Commands) -> AsyncIterator[ControlServer]:
    control = ControlServer(tmp_path, commands.table())
    await control.start()
    yield control
    commands.gate.set()
    await control.close()


async def ask(directory: Path, command: str, args: Message | None = None, **options: Any) -> Message:
    return await asyncio.to_thread(call, directory, command, args, **options)


async def raw(directory: Path, *lines: bytes) -> list[Message]:
    """Send bytes as they are, end the input, return every answer."""
    reader, writer = await asyncio.open_unix_connection(str(directory / "control.sock"), limit=MAX_LINE_BYTES * 2)
    writer.write(b"".join(lines))
    writer.write_eof()
    answers = [json.loads(line) async for line in reader]
    writer.close()
    return answers


async def test_a_request_is_answered_with_progress_and_then_the_result(server: ControlServer, tmp_path: Path) -> None:
    steps: list[Message] = []
    result = await ask(tmp_path, "echo", {"steps": 3, "name": "ä"}, on_progress=steps.append)
    assert result == {"args": {"steps": 3, "name": "ä"}}
    assert steps == [{"step": 0}, {"step": 1}, {"step": 2}]


async def test_only_the_owner_may_use_the_socket(server: ControlServer, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "control.sock").stat().st_mode) == 0o600


async def test_an_error_arrives_as_the_class_that_was_raised(server: ControlServer, tmp_path: Path) -> None:
    with pytest.raises(EpochError, match="epoch 7 exists") as caught:
        await ask(tmp_path, "refuse")
    assert (caught.value.hint, caught.value.exit_code) == ("look at status", 33)


async def test_an_error_whose_class_needs_more_than_a_message_keeps_its_exit_code(
    server: ControlServer, tmp_path: Path
) -> None:
    with pytest.raises(BlockreplError, match=r"demo.toml: \$.node: is wrong") as caught:
        await ask(tmp_path, "misread")
    assert (caught.value.hint, caught.value.exit_code) == ("write it right", DefinitionError.exit_code)


async def test_an_unexpected_exception_is_answered_and_logged_and_the_node_lives_on(
    server: ControlServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BlockreplError, match="internal error: ZeroDivisionError") as caught:
        await ask(tmp_path, "fail")
    assert caught.value.exit_code == BlockreplError.exit_code
    assert "nobody expected this" in caplog.text
    assert await ask(tmp_path, "echo") == {"args": {}}


async def test_an_unknown_command_is_answered_with_the_nearest_one(server: ControlServer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no command 'ecko'") as caught:
        await ask(tmp_path, "ecko")
    assert caught.value.hint == "did you mean echo?"


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        (b"hello\n", "ProtocolError", "no JSON"),
        (b"[" * 100_000 + b"\n", "ProtocolError", "no JSON"),
        (b"[]\n", "ProtocolError", "JSON object"),
        (b"\xff\xfe\n", "ProtocolError", "no JSON"),
        (b"{}\n", "RefusedError", "version None"),
        (b'{"v": 2, "command": "echo"}\n', "RefusedError", "version 2"),
        (b'{"v": true, "command": "echo"}\n', "RefusedError", "version True"),
        (b'{"v": 1}\n', "ProtocolError", "command is a string"),
        (b'{"v": 1, "command": "echo", "args": []}\n', "ProtocolError", "args an object"),
        (b'{"v": 1, "command": "echo", "arg": {}}\n', "ProtocolError", "unknown key 'arg'"),
    ],
)
async def test_bad_input_is_answered_and_the_connection_goes_on(
    server: ControlServer, tmp_path: Path, line: bytes, kind: str, words: str
) -> None:
    answers = await raw(tmp_path, line, b'{"v": 1, "command": "echo"}\n')
    assert answers[0]["error"]["kind"] == kind
    assert words in answers[0]["error"]["message"]
    assert answers[0]["error"]["exit_code"] > 0
    assert answers[1:] == [{"result": {"args": {}}}]


async def test_an_oversized_request_is_answered_and_ends_the_connection(server: ControlServer, tmp_path: Path) -> None:
    answers = await raw(tmp_path, b"x" * (MAX_LINE_BYTES + 4096))
    assert len(answers) == 1
    assert "at most 1048576 bytes" in answers[0]["error"]["message"]


async def test_a_request_that_is_cut_off_does_nothing(server: ControlServer, tmp_path: Path) -> None:
    assert await raw(tmp_path, b'{"v": 1, "command": "echo"}') == []
    assert await ask(tmp_path, "echo") == {"args": {}}


async def test_a_hundred_connections_that_say_nothing_disturb_nobody(server: ControlServer, tmp_path: Path) -> None:
    idle = [await asyncio.open_unix_connection(str(tmp_path / "control.sock")) for _ in range(100)]
    assert await ask(tmp_path, "echo") == {"args": {}}
    for _, writer in idle:
        writer.close()


async def test_what_was_begun_is_finished_when_the_client_goes_away(
    server: ControlServer, tmp_path: Path, commands: Commands
) -> None:
    _, writer = await asyncio.open_unix_connection(str(tmp_path / "control.sock"))
    writer.write(b'{"v": 1, "command": "slow"}\n')
    await commands.entered.wait()
    writer.close()
    await ask(tmp_path, "echo")
    commands.gate.set()
    await commands.finished.wait()
    assert not commands.cancelled.is_set()


async def test_a_verify_ends_when_the_client_goes_away(
    server: ControlServer, tmp_path: Path, commands: Commands
) -> None:
    _, writer = await asyncio.open_unix_connection(str(tmp_path / "control.sock"))
    writer.write(b'{"v": 1, "command": "verify"}\n')
    await commands.entered.wait()
    writer.close()
    await commands.cancelled.wait()


async def test_close_lets_an_answer_under_way_end_and_removes_the_socket(tmp_path: Path, commands: Commands) -> None:
    control = ControlServer(tmp_path, commands.table())
    await control.start()
    answer = asyncio.ensure_future(ask(tmp_path, "slow"))
    await commands.entered.wait()
    closing = asyncio.ensure_future(control.close())
    await asyncio.sleep(0)
    commands.gate.set()
    assert await answer == {"slow": True}
    await closing
    assert not (tmp_path / "control.sock").exists()
    with pytest.raises(NotRunningError, match="no node runs here"):
        await ask(tmp_path, "echo")


async def test_a_long_directory_is_no_obstacle(tmp_path: Path, commands: Commands) -> None:
    directory = tmp_path / ("d" * 120) / ("e" * 120)
    directory.mkdir(parents=True)
    control = ControlServer(directory, commands.table())
    await control.start()
    assert await ask(directory, "echo") == {"args": {}}
    await control.close()


async def test_the_socket_of_a_killed_process_is_replaced(tmp_path: Path, commands: Commands) -> None:
    with socket.socket(socket.AF_UNIX) as left:  # closing does not remove the name, nor does kill -9
        left.bind(str(tmp_path / "control.sock"))
        left.listen()
    assert not is_running(tmp_path)
    control = ControlServer(tmp_path, commands.table())
    await control.start()
    assert await ask(tmp_path, "echo") == {"args": {}}
    await control.close()


async def test_a_socket_that_answers_is_left_alone(server: ControlServer, tmp_path: Path, commands: Commands) -> None:
    with pytest.raises(InUseError, match="another process answers"):
        await ControlServer(tmp_path, commands.table()).start()
    assert await ask(tmp_path, "echo") == {"args": {}}


async def test_a_file_in_the_socket_s_place_is_not_removed(tmp_path: Path, commands: Commands) -> None:
    (tmp_path / "control.sock").write_text("precious")
    with pytest.raises(InUseError, match="is no socket"):
        await ControlServer(tmp_path, commands.table()).start()
    assert (tmp_path / "control.sock").read_text() == "precious"


async def test_a_missing_directory_is_a_clear_error(tmp_path: Path, commands: Commands) -> None:
    with pytest.raises(StorageError, match="No such file"):
        await ControlServer(tmp_path / "absent", commands.table()).start()
    with pytest.raises(NotRunningError, match="No such file") as caught:
        call(tmp_path / "absent", "echo")
    assert "create" in caught.value.hint


@pytest.fixture
def listener(tmp_path: Path) -> Any:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "control.sock"))
    sock.listen()
    yield sock
    sock.close()


def test_a_node_that_says_nothing_is_given_up(listener: socket.socket, tmp_path: Path) -> None:
    assert is_running(tmp_path)
    with pytest.raises(TimeoutExpiredError, match=r"no answer to status for 0.05 s"):
        call(tmp_path, "status", timeout_s=0.05)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"", NotRunningError, "ended before it answered"),
        (b'{"progress": {}}\n', NotRunningError, "ended before it answered"),
        (b"nonsense\n", BlockreplError, "no JSON"),
        (
            b'{"error": {"kind": "Surprise", "message": "new in version 9", "exit_code": 77}}\n',
            BlockreplError,
            "new in",
        ),
        (b'{"error": 5}\n', BlockreplError, "without saying why"),
    ],
)
def test_a_strange_answer_is_an_error_and_no_traceback(
    listener: socket.socket, tmp_path: Path, answer: bytes, error: type[BlockreplError], words: str
) -> None:
    def reply() -> None:
        peer, _ = listener.accept()
        peer.recv(1 << 16)
        peer.sendall(answer)
        peer.close()

    thread = threading.Thread(target=reply)
    thread.start()
    with pytest.raises(error, match=words):
        call(tmp_path, "status")
    thread.join()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every socket")
def test_a_socket_of_another_user_is_no_missing_node(listener: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "control.sock").chmod(0)
    with pytest.raises(BlockreplError, match="permission denied"):
        call(tmp_path, "status")
