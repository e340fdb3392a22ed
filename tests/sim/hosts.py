"""Hosts: threads that write, wait, and write what depends on it, over all volumes of the group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.errors import BlockError
from blockrepl.node.primary_host import PrimaryVolume
from tests.sim.network import PoisonPool
from tests.sim.process import BLOCK, PrimaryProcess
from tests.sim.world import World
from tests.sim.write import Write

RETRY_S = 0.05


class Hosts:
    """Some threads; each waits for its write before the next one."""

    def __init__(self, world: World, oracle: Any, volumes: Mapping[int, Any], threads: int, max_blocks: int) -> None:
        """``oracle``: `Oracle` or `SitesOracle`; ``volumes``: volume → the process that serves it, when it does."""
        self.world = world
        self.oracle = oracle
        self.volumes = volumes
        self.max_blocks = max_blocks
        self.stopped = False
        self._open: dict[int, tuple[PrimaryProcess, int]] = {}  # writes without an answer: process, its life
        self.errors = 0
        self.digests = 0
        self._pool = PoisonPool(1 << 16)
        self._ids = 0
        for _ in range(threads):
            world.after(world.random.uniform(0, 0.1), self._next)

    @property
    def waiting(self) -> int:
        """Writes without an answer, of processes that live."""
        return sum(process.life == life for process, life in self._open.values())

    def _next(self) -> None:
        if self.stopped:
            return
        random = self.world.random
        volume_id = random.choice(list(self.volumes))
        process = self.volumes[volume_id]
        awake = process.alive and process.paused_until_s <= self.world.now_s
        ready = awake and process.primary is not None and process.primary.role.serving
        if not ready or process.volumes[volume_id].congested:
            self.world.after(RETRY_S, self._next)
        elif random.random() < 0.05:
            self.world.enter(process, lambda: self._flush(process, volume_id))
        elif random.random() < 0.02:
            self.world.enter(process, lambda: self._verify(process, volume_id))
        else:
            self.world.enter(process, lambda: self._write(process, volume_id))

    def _later(self) -> None:
        random = self.world.random
        self.world.after(random.choice([0.0, 0.001, 0.01, 0.1]), self._next)

    def _watch(self, process: PrimaryProcess) -> Callable[[], bool]:
        """A thread goes on when its process dies; returns whether an answer comes in time for it."""
        life, answered = process.life, False

        def dead() -> None:
            nonlocal answered
            if answered:
                return
            if process.life != life:
                answered = True
                self._later()
            else:
                self.world.after(RETRY_S, dead)

        def answer() -> bool:
            nonlocal answered
            first, answered = not answered, True
            return first

        self.world.after(RETRY_S, dead)
        return answer

    def _write(self, process: PrimaryProcess, volume_id: int) -> None:
        volume = process.volumes[volume_id]
        write, batch = self._make(volume_id, volume)
        answer = self._watch(process)
        life = process.life
        self.oracle.host_submits(process, batch, write)

        def done(batch: WriteBatch) -> None:
            assert process.life == life, "a dead process told a host"
            self.oracle.submitting.pop(id(batch), None)
            del self._open[id(write)]
            self.world.say(process.name, f"tells a host: write {write.number} of volume {volume_id} "
                           + ("is done" if batch.errors is None else "failed"))  # fmt: skip
            if batch.errors is None:
                self.oracle.complete(process, write)
                if write.fua:
                    self.oracle.check_flushed(process, volume_id, write.number)
            else:
                self.errors += 1
            if answer():
                self._later()

        batch.done = done
        self._open[id(write)] = process, life
        if volume.submit(batch):
            done(batch)

    def _make(self, volume_id: int, volume: PrimaryVolume) -> tuple[Write, WriteBatch]:
        random = self.world.random
        blocks = volume.size_bytes // BLOCK
        write = Write(volume_id, [], [], [], [], self.oracle.completed)
        batch = WriteBatch(lambda _: None)
        count = random.choice([1, 1, 1, 2, 4])
        chunk = batch.chunk = self._pool.take(count * self.max_blocks * BLOCK)
        at = 0
        for _ in range(count):
            length = random.randint(1, min(self.max_blocks, blocks))
            offset = random.randrange(0, blocks - length + 1)
            op = random.choice([Op.WRITE] * 8 + [Op.ZERO, Op.TRIM])
            flags = WriteFlag.FUA if random.random() < 0.1 else WriteFlag.NONE
            write.fua = write.fua or bool(flags)
            payload = b""
            if op == Op.WRITE:
                self._ids += 1
                payload = b"%015d " % self._ids * (length * BLOCK // 16)
                chunk.view[at : at + len(payload)] = payload
                batch.payloads.append(chunk.view[at : at + len(payload)])
                at += len(payload)
            else:
                batch.payloads.append(None)
            for column, value in (
                (batch.ops, op), (batch.offsets, offset * BLOCK), (batch.lengths, length * BLOCK),
                (batch.flags, flags), (batch.cookies, self._ids),
            ):  # fmt: skip
                column.append(int(value))
            write.payloads.append(payload)
        write.ops, write.offsets, write.lengths = list(batch.ops), list(batch.offsets), list(batch.lengths)
        batch.size_bytes = at
        batch.fua = write.fua
        return write, batch

    def _flush(self, process: PrimaryProcess, volume_id: int) -> None:
        number = process.primary.role.acked
        answer = self._watch(process)

        def done(error: BlockError | None) -> None:
            if error is None:
                self.oracle.check_flushed(process, volume_id, number)
            if answer():
                self._later()

        process.volumes[volume_id].flush(done)

    def _verify(self, process: PrimaryProcess, volume_id: int) -> None:
        """A digest of a range: the S-VOL must agree at its number."""
        size = process.volumes[volume_id].size_bytes
        start = self.world.random.randrange(0, size // BLOCK) * BLOCK

        def digested(fields: dict[str, object]) -> None:
            if not fields.get("aborted"):
                if not self.oracle.pairs.consistent_at(int(str(fields["number"]))):
                    return
                self.digests += 1
                assert fields["different"] == [], f"verify found differences: {fields}"

        host = process.primary
        host.on_digested = digested
        host.perform(host.role.digest(volume_id, start, size - start))
        host.settle()
        self._later()
