"""`verify`: compares P-VOLs with their S-VOLs while hosts write, each block at one number."""

from __future__ import annotations

import asyncio
from typing import Any

from blockrepl.definition import Volume
from blockrepl.errors import TimeoutExpiredError, UsageError
from blockrepl.formats.link import Pair
from blockrepl.node.control import Progress
from blockrepl.node.digests import VERIFY_BLOCK_BYTES, VERIFY_RANGE_BYTES
from blockrepl.node.primary_host import PrimaryHost
from blockrepl.replication.primary import Phase

VERIFY_SILENCE_S = 30.0
VERIFY_WINDOW = 4  # ranges on their way at once


class VerifyRun:
    """The verifies of one primary host."""

    def __init__(self, host: PrimaryHost) -> None:
        self._host = host
        self._waiting: dict[tuple[int, int], asyncio.Future[dict[str, Any]]] = {}
        host.on_digested = self._digested

    async def run(self, volume: Volume, progress: Progress) -> dict[str, Any]:
        """Compare a whole volume; the result as docs/control.md has it. Raises UsageError, TimeoutExpiredError."""
        name = volume.name
        if self._host.role.phase is not Phase.LIVE:
            why = self._host.role.why_held() or f"its hosts work alone ({Pair(self._host.role.state.suspended).name})"
            raise UsageError(f"{name} cannot be compared now: {why}", hint="see: blockrepl explain")
        blocks = 0
        different: list[int] = []
        done_bytes = 0
        starts = iter(range(0, volume.size_bytes, VERIFY_RANGE_BYTES))
        waiting: set[asyncio.Future[dict[str, Any]]] = set()
        while True:
            for start in starts:
                waiting.add(self._ask(volume.id, start, min(VERIFY_RANGE_BYTES, volume.size_bytes - start)))
                if len(waiting) >= VERIFY_WINDOW:
                    break
            if not waiting:
                break
            done, waiting = await asyncio.wait(
                waiting, timeout=VERIFY_SILENCE_S, return_when=asyncio.FIRST_COMPLETED
            )  # fmt: skip
            if not done:
                raise TimeoutExpiredError(f"{name}: no answer from the secondary for {VERIFY_SILENCE_S} s")
            for future in done:
                fields = future.result()
                if fields.get("aborted") or not fields["blocks"]:
                    raise UsageError("the link to the intermediate broke", hint="see `status`, then verify again")
                blocks += fields["blocks"]
                different += fields["different"]
                done_bytes += fields["length_bytes"]
            progress({"done_bytes": done_bytes, "total_bytes": volume.size_bytes})
        ranges = [
            {"offset_bytes": at, "length_bytes": min(VERIFY_BLOCK_BYTES, volume.size_bytes - at)}
            for at in sorted(different)
        ]
        return {
            "volume": name, "same": not different, "compared_bytes": done_bytes, "compared_blocks": blocks,
            "differing": ranges,
        }  # fmt: skip

    def _ask(self, volume_id: int, start: int, length: int) -> asyncio.Future[dict[str, Any]]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[volume_id, start] = future
        self._host.perform(self._host.role.digest(volume_id, start, length))
        self._host.settle()
        return future

    def _digested(self, fields: dict[str, Any]) -> None:
        future = self._waiting.pop((fields["volume"], fields["offset_bytes"]), None)
        if future is not None and not future.done():
            future.set_result(fields)
