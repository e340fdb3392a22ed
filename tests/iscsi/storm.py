"""Ill-meaning initiators over real sockets: ``python -m tests.iscsi.storm HOST PORT TARGET [--cases N | --seconds S]``.

Conversations as in `fuzz`, some at a time, without a moment's rest. Prints how many it had.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from random import Random

from tests.iscsi import conversations
from tests.iscsi.pdu import Reader

WORKERS = 8
_QUIET_S = 0.02  # without an answer, the next thing is said
_SLOW_QUIET_S = 2.0
_LINE_BYTES = 1 << 18


async def converse(host: str, port: int, target: str, random: Random) -> None:
    """One conversation; the target may end it when it likes."""
    me = conversations.somebody(random, target, 512)
    talk = conversations.talk(me)
    answers, writer = await asyncio.open_connection(host, port, limit=_LINE_BYTES)
    reader = Reader()
    try:
        content = next(talk)
        while True:
            for piece in conversations.pieces(random, content):
                if writer.transport.is_closing():
                    return
                writer.write(piece)
            async with asyncio.timeout(_SLOW_QUIET_S):
                await writer.drain()
            received = b""
            with suppress(TimeoutError):
                async with asyncio.timeout(_QUIET_S):
                    received = await answers.read(_LINE_BYTES)
                if not received:
                    return
            content = talk.send(reader.feed(received))
            reader.digests = me.digests
    except (StopIteration, ConnectionError, TimeoutError):
        return
    finally:
        writer.transport.abort()


async def storm(host: str, port: int, target: str, cases: Iterator[int], seconds: float | None) -> int:
    """How many conversations there were."""
    end_s = None if seconds is None else time.monotonic() + seconds
    had = 0

    async def worker() -> None:
        nonlocal had
        for number in cases:
            if end_s is not None and time.monotonic() > end_s:
                return
            await converse(host, port, target, Random(number))
            had += 1

    await asyncio.gather(*(worker() for _ in range(WORKERS)))
    return had


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.iscsi.storm", description=__doc__)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("target")
    parser.add_argument("--cases", type=int, help="so many (without --seconds and this: for ever)")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="K", help="the first case (0)")
    options = parser.parse_args()
    numbers = (
        itertools.count(options.first) if options.cases is None else range(options.first, options.first + options.cases)
    )
    print(asyncio.run(storm(options.host, options.port, options.target, iter(numbers), options.seconds)), flush=True)


if __name__ == "__main__":
    main()
