"""A short-lived process for everything that opens the served file or its device.

Never in the serving process: a thread that waits for its own process keeps a killed one from dying, since the
FUSE connection ends only when the last thread is gone, and the thread waits for the connection.

Usage: python -m blockrepl.frontends.loop.helper attach FILE BLOCK_SIZE rw|ro
       python -m blockrepl.frontends.loop.helper detach DEVICE FILE
       python -m blockrepl.frontends.loop.helper resize DEVICE FILE
       python -m blockrepl.frontends.loop.helper abandon DEVICE FILE
Prints one JSON object: {"device": …} or {"error": {"kind", "message", "hint"}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import sys
import time

from blockrepl.errors import BlockreplError
from blockrepl.frontends.loop import device, system


def attach(path: str, block_size_bytes: int, *, read_only: bool) -> dict[str, object]:
    """Put a loop device over the served file."""
    return {"device": asyncio.run(device.configure(path, block_size_bytes, read_only=read_only))}


def detach(name: str, path: str) -> dict[str, object]:
    """Free the device, then unmount the file; refuses while someone uses the device."""
    device.release(name, path)
    end_s = time.monotonic() + device.SETTLE_TIMEOUT_S
    while True:
        try:
            system.unmount(path, lazily=time.monotonic() > end_s)
        except OSError as error:
            if error.errno == errno.EBUSY:  # the kernel closes the backing file a moment later
                time.sleep(device.POLL_S)
                continue
            if error.errno != errno.EINVAL:  # EINVAL: not mounted
                raise
        return {"device": name}


def resize(name: str, path: str) -> dict[str, object]:
    """The file has grown: so does the device."""
    device.resize(name, path)
    return {"device": name}


def abandon(name: str, path: str) -> dict[str, object]:
    """Undo what can be undone now, and have the kernel do the rest when the last user goes."""
    if device.backing_file(name) == path:
        device.free(name)
    with contextlib.suppress(OSError):
        system.unmount(path, lazily=True)
    return {"device": name}


def main(arguments: list[str]) -> int:
    """Run one command of the usage above."""
    command, *rest = arguments
    answer: dict[str, object]
    try:
        if command == "attach":
            answer = attach(rest[0], int(rest[1]), read_only=rest[2] == "ro")
        elif command == "detach":
            answer = detach(rest[0], rest[1])
        elif command == "resize":
            answer = resize(rest[0], rest[1])
        else:
            answer = abandon(rest[0], rest[1])
    except BlockreplError as error:
        answer = {"error": {"kind": type(error).__name__, "message": str(error), "hint": error.hint}}
    except OSError as error:
        answer = {"error": {"kind": "OSError", "message": str(error), "hint": ""}}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
