"""The oracle of groups whose sites change roles: one line of numbers, and what hosts may find at either site.

It knows what was acknowledged where, where the group was formed anew, what each target held then and may go back to,
and what a takeover gave up.
"""

from __future__ import annotations

from typing import Any

from blockrepl.formats.link import Message, Pair, decode_body, decode_header
from blockrepl.formats.record import RecordFlag, RecordHead, RecordKind, iterate_entries
from blockrepl.replication.actions import Send
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.opening import Phase
from blockrepl.replication.primary import Primary
from blockrepl.replication.secondary import Phase as SecondaryPhase
from blockrepl.replication.secondary import Secondary
from blockrepl.replication.takeover import Takeover
from tests.sim.bits import BITMAP_BLOCK
from tests.sim.data_process import DataProcess
from tests.sim.history import History, Numbered
from tests.sim.oracle import demand, recovered_number
from tests.sim.pairs import PairTruth
from tests.sim.process import IntermediateProcess, Layout, Process, Watcher
from tests.sim.truth import HostTruth
from tests.sim.world import Violation, World
from tests.sim.write import Write

CLOSED = (Phase.FENCED, Phase.FAILED, Phase.REFORMING)  # an intermediate that makes no promise to a takeover


class SitesOracle(Watcher):
    """Checks everything that `Oracle` does, for as long as it makes sense, and what swaps must keep."""

    def __init__(self, world: World, layout: Layout) -> None:
        self.world = world
        self.layout = layout
        self.history = History({v: size for v, (_, _, size) in layout.volumes.items()})
        self._writes: dict[tuple[int, int, int], Write | None] = {}
        self._keys: set[tuple[int, int, int]] = set()
        self.submitting: dict[int, Write] = {}
        self.sides = [PairTruth(layout), PairTruth(layout)]
        self.acked = self.durable = self.validate_sent = self.completed = 0
        self.completed_of: dict[str, int] = {}
        self.prepared: dict[str, int] = {}  # reported, by nodes that were not replaced since
        self._told: dict[str, int] = {}  # by whoever had the name
        self.applied_at: dict[str, int] = {}
        self.known_epoch: dict[str, int] = {}
        self.welcomed: dict[str, int] = {}
        self.goes_back_to: dict[str, int] = {}
        self.excused: set[str] = set()
        self.completions = 0
        self.in_pair = True
        self.journal_lost = False  # the intermediate is new; nothing was formed anew yet
        self.taken: tuple[int, bool, int] | None = None  # by the newest takeover since a reform: number, drained, epoch
        self.kept: dict[
            str, tuple[int, dict[int, bytes], str]
        ] = {}  # targets formed anew: number, content, what it was
        self._seen: set[tuple[str, Any]] = set()  # (node, epoch) of activations
        self._side_epoch: list[Any] = [None, None]
        self._allowed: dict[int, set[int]] = {}  # volume → blocks that a copy may touch
        self._strict: set[str] = set()  # sources whose copies are bounded
        self.differed_bytes = self.copied_bytes = self.reforms = 0
        self.taken_over_at: int | None = None  # ever

    # what others look at

    @property
    def numbered(self) -> int:
        """The highest number given."""
        return self.history.numbered

    @property
    def records(self) -> list[Numbered]:
        """The history."""
        return self.history.records

    @property
    def pairs(self) -> SitesOracle:
        """Of which site a write is, this knows."""
        return self

    def consistent_at(self, number: int) -> bool:
        """See `History`."""
        return self.history.consistent_at(number)

    def image(self, volume: int, number: int) -> bytes:
        """See `History`."""
        return self.history.image(volume, number)

    # hosts

    def host_submits(self, process: DataProcess, batch: Any, write: Write) -> None:
        """A host's write is about to be taken at a site."""
        self.submitting[id(batch)] = write
        self.sides[process.site].submitted(write)

    def submitted(self, process: Any, batch: Any, incarnation: int, number: int) -> None:
        write = self.submitting.get(id(batch)) if batch is not None else None
        self._writes[process.node_id, incarnation, number] = write

    def taken_alone(self, batch: Any) -> None:
        if id(batch) in self.submitting:
            self.submitting[id(batch)].solo = True

    def storing(self, process: Any, batch: Any, volume: int) -> None:
        write = self.submitting.get(id(batch))
        if write is not None and write.solo:
            self.sides[process.site].storing_alone(process, batch, volume)

    def complete(self, process: Any, write: Write) -> None:
        """A host was told that its write succeeded."""
        self.completions += 1
        number, name = write.number, process.name
        known, welcomed = self.known_epoch.get(name, 0), self.welcomed.get(name, 0)
        welcomed = max(welcomed, process.primary.role.state.epoch.number)  # the group may have been formed anew
        demand(welcomed >= known, f"6: {name} completed {number} in epoch {welcomed}, had received {known}")
        if self.sides[process.site].completed(process, write):
            return
        demand(number > 0, "completed a write that was never numbered")
        found = self.history.find(number - len(write.ops) + 1)
        demand(found is not None and found.write is write, f"completed {number}, lost since")
        demand(number <= self.acked, f"completed {number}, acknowledged is {self.acked}")
        if self.taken is not None and self.taken[1]:
            demand(number <= self.taken[0], f"completed {number} after a drained takeover at {self.taken[0]}")
        self.completed = max(self.completed, number)
        self.completed_of[name] = max(self.completed_of.get(name, 0), number)

    def check_flushed(self, process: Any, volume: int, number: int) -> None:
        """Rule 4, for what has a number: it is on the platter, or a later write is."""
        side = self.sides[process.site]
        if process.name in side.alone_ever or number < self.history.base(volume) or process.source is None:
            return
        file = process.machine.files[f"volume {volume}"]
        expected, later = self.image(volume, number), self._touched(volume, number)
        for start in range(0, len(expected), 512):
            same = file.platter[start : start + 512] == expected[start : start + 512]
            demand(same or start // 512 in later, f"flushed volume {volume} at {number}: {start} is not on the platter")

    def _touched(self, volume: int, number: int) -> set[int]:
        """Sectors that records above a number touch."""
        return {
            sector
            for each in self.records[self.history.count(number) :]
            for at, _, _, offset, length, _ in iterate_entries(each.head, memoryview(each.record)) if at == volume
            for sector in range(offset // 512, (offset + length + 511) // 512)
        }  # fmt: skip

    # the intermediate

    def appended(self, process: IntermediateProcess, head: RecordHead, record: memoryview) -> None:
        demand(head.first == self.numbered + 1, f"numbered {head.first} after {self.numbered}")
        side = self.sides[process.host.role.state.direction]
        if head.sender == process.node_id:
            side.numbered(head, None)
            self.history.add(Numbered(head, bytes(record), None))
            return
        key = head.sender, head.incarnation, head.batch
        demand(key in self._writes, f"a batch that nobody submitted: {key}")
        demand(key not in self._keys, f"batch {key} numbered twice")
        self._keys.add(key)
        known = self.known_epoch.get(process.name, 0)
        demand(head.epoch >= known, f"numbered {head.first} in epoch {head.epoch}, but had received epoch {known}")
        for each in self.records[-40:]:
            if each.head.sender == head.sender:
                older = (each.head.incarnation, each.head.batch) < key[1:]
                demand(older, f"batch {key} numbered after {(each.head.incarnation, each.head.batch)}")
        write = self._writes[key]
        if write is not None:
            demand(head.first > write.after, f"{head.first} was submitted after {write.after} had completed")
            write.number = head.last
            side.numbered(head, write)
            self._compare(write, head, record)
        elif head.flags & RecordFlag.COPY and head.stream != process.node_id:
            self._bound(process.layout.names[head.sender], head, record)
        if write is not None:
            for volume, block in _blocks(head, record):
                self._allowed.get(volume, set()).add(block)
        self.history.add(Numbered(head, bytes(record), write))

    def _compare(self, write: Write, head: RecordHead, record: memoryview) -> None:
        found = [(volume, op, offset, length, bytes(p) if p is not None else b"") for volume, op, _, offset, length, p
                 in iterate_entries(head, record)]  # fmt: skip
        columns = zip(write.ops, write.offsets, write.lengths, write.payloads, strict=True)
        demand(found == [(write.volume, *each) for each in columns], f"record {head.first} is not what the host wrote")

    def _bound(self, sender: str, head: RecordHead, record: memoryview) -> None:
        """The delta only: a copy after a reform brings blocks that differed, or were written since."""
        for volume, block in _blocks(head, record):
            self.copied_bytes += BITMAP_BLOCK
            if sender in self._strict:
                allowed = self._allowed.get(volume, set())
                demand(block in allowed, f"block {block} of volume {volume} was copied, and was the same at both sites")

    def reformed(self, process: Process, number: int) -> None:
        self.history.begin_anew(number)
        self._keys = set()
        for write in (*self.submitting.values(), *self._writes.values()):
            if write is not None:  # numbers that only a lost journal knew are given again
                write.after = min(write.after, number)
        self.acked = self.durable = self.validate_sent = self.completed = number
        self.completed_of.clear()
        self.journal_lost, self.taken = False, None
        self._told.clear()
        self.reforms += 1

    # messages

    def sent(self, process: Any, kind: int, link: int, action: Send) -> None:
        if kind not in (Message.ACK, Message.VALIDATE, Message.PREPARED, Message.WELCOME):
            return
        view = memoryview(bytes(action.buffers[0]))
        fields = decode_body(decode_header(view), view)
        name = process.name
        if kind == Message.ACK:
            durable = process.host.role.durable_number
            demand(fields["number"] <= durable, f"acknowledged {fields['number']}, durable is {durable}")
            self.acked = max(self.acked, fields["number"])
        elif kind == Message.WELCOME and isinstance(process, IntermediateProcess):
            self.acked = max(self.acked, fields["through"])
        elif kind == Message.WELCOME:
            self.prepared[name] = max(self.prepared.get(name, 0), fields["prepared"])
        elif kind == Message.VALIDATE:
            number = fields["number"]
            self.validate_sent = max(self.validate_sent, number)
            targets = self.layout.targets(process.host.role.state.direction)
            low = {each: max(self.prepared.get(each, 0), self._told.get(each, 0)) for each in targets}
            demand(number <= min(low.values()), f"VALIDATE {number}, but prepared are {low}")
        else:
            self.prepared[name] = max(self.prepared.get(name, 0), fields["number"])

    def received(self, process: Process, kind: int, fields: dict[str, Any]) -> None:
        """No promise stops a source: its hosts go on until a reform is stored, and no takeover binds it."""
        name = process.name
        promise = kind == Message.PROMISE and not fields["dry_run"]
        if promise and isinstance(process, DataProcess) and process.source is not None:
            return
        if promise and isinstance(process, IntermediateProcess) and process.host.role.phase in CLOSED:
            return  # it answers with the epoch that it stands by
        if kind in (Message.REFUSED, Message.WELCOME) or promise:
            epochs = [fields[key].number for key in ("epoch", "promised") if key in fields]
            self.known_epoch[name] = max(self.known_epoch.get(name, 0), *epochs)
        if kind == Message.WELCOME:
            self.welcomed[name] = max(self.welcomed.get(name, 0), fields["epoch"].number)

    # recoveries

    def event(self, process: Process, text: str) -> None:
        if text.startswith("stopped:") and process.name not in self.excused:
            raise Violation(f"{process.name} stopped without a disk error: {text}")

    def wiped(self, process: Process) -> None:
        """A node was replaced by an empty one."""
        self._told[process.name] = self.prepared.get(process.name, 0)
        for marks in (self.prepared, self.applied_at, self.known_epoch, self.welcomed, self.goes_back_to, self.kept):
            marks.pop(process.name, None)
        if isinstance(process, IntermediateProcess):
            self.journal_lost = True

    def recovered(self, process: Any, heads: list[RecordHead], role: Any) -> None:
        name, state = process.name, role.state
        if isinstance(role, Primary):
            self.known_epoch[name] = max(state.epoch.number, state.promised.number)
            self.welcomed[name] = max(self.welcomed.get(name, 0), state.epoch.number)
            self._strict.discard(name)  # it copies by its bits now
            return
        for head in heads:
            if isinstance(role, Secondary) and head.epoch < state.epoch.number and head.last > state.number:
                continue
            known = self.history.find(head.first)
            if known is None or known.head.header_crc != head.header_crc:
                raise Violation(f"{name} recovered record {head.first}, which is not of the history")
        if isinstance(role, Intermediate):
            self._recovered_intermediate(name, role)
        elif not state.active:
            self.known_epoch[name] = max(state.epoch.number, state.promised.number)
            if state.copying and state.copy_from == state.number and self.kept.get(name, (0,))[0] != state.number:
                self._keep(process, state)
            self._forget_what_is_discarded(name, role)
            reported = self.prepared.get(name, 0)
            demand(role.held >= reported, f"{name} had reported prepared {reported}, holds {role.held}")
            if process.host is not None:  # how far its S-VOLs are ahead of what it knows
                self.applied_at[name] = max(self.applied_at.get(name, 0), process.host.role.validated)

    def _recovered_intermediate(self, name: str, role: Intermediate) -> None:
        self.known_epoch[name] = max(role.state.epoch.number, role.state.promised.number)
        if self.journal_lost:
            return
        promised = max(self.acked, self.durable, self.completed)
        demand(role.numbered >= promised, f"recovered {role.numbered}, but {promised} was promised")
        self.history.cut(role.numbered)
        self._keys = {(e.head.sender, e.head.incarnation, e.head.batch) for e in self.records}

    def power_lost(self, process: Any) -> None:
        if not isinstance(process, DataProcess):
            return
        side = self.sides[process.site]
        for volume in process.volume_ids:
            side.volumes[volume].power_lost()
        if self.journal_lost:  # as a disk without a journal: what was not flushed may be gone
            self._restart_truth(process)

    def _restart_truth(self, process: DataProcess) -> None:
        side = self.sides[process.site]
        for volume in process.volume_ids:
            content = bytes(process.machine.files[f"volume {volume}"].cache)
            side.volumes[volume] = HostTruth(len(content), content)

    # reforms

    def stays_source(self, process: Any, epoch: int) -> None:
        self.known_epoch[process.name] = max(self.known_epoch.get(process.name, 0), epoch)
        self.welcomed[process.name] = max(self.welcomed.get(process.name, 0), epoch)

    def became_target(self, process: Any) -> None:
        state = process.host.role.state
        self.goes_back_to.pop(process.name, None)
        self.applied_at[process.name] = self.prepared[process.name] = state.number
        self._keep(process, state)

    def _keep(self, process: DataProcess, state: Any) -> None:
        """What a target formed anew holds is what it may go back to."""
        name = process.name
        self.prepared[name] = max(self.prepared.get(name, 0), state.number)
        if state.initial:
            self.kept.pop(name, None)
            return
        content = {v: bytes(process.machine.files[f"volume {v}"].cache) for v in process.volume_ids}
        self.kept[name] = state.number, content, ""
        others = {each: self.kept[each][1] for each in self.layout.sources(process.site) if each in self.kept
                  and self.kept[each][0] == state.number}  # fmt: skip
        if len(others) == len(self.layout.sources(process.site)):
            self._check_kept(process.site, state.number, {v: c for each in others.values() for v, c in each.items()})

    def _check_kept(self, site: int, number: int, content: dict[int, bytes]) -> None:
        """All targets together are at a prefix of the group, as a takeover now would present it."""
        truth = self.sides[site].volumes
        if all(truth[v].wrong(c) < 0 for v, c in content.items()):
            return  # they were sources: what hosts had been told there is there
        candidates = {0, *(each.head.last for each in self.records), *(self.history.base(v) for v in content)}
        for each in sorted(candidates, reverse=True):
            if all(self.image(v, each) == c for v, c in content.items()):
                return
        raise Violation(f"20: the targets that are to go back to {number} are at no prefix of the group")

    def rejoining(self, process: Any, resync: int) -> None:
        number = max(resync, process.primary.role.joining.through)  # it may have gone alone in the middle of it
        for volume in process.volume_ids:
            self.history.rebase(volume, number, bytes(process.machine.files[f"volume {volume}"].cache))
        if process.source is not None and process.source.host.role.resyncing.compare:
            self._strict.add(process.name)
            for volume in process.volume_ids:
                self._measure(process, volume)

    def _measure(self, process: DataProcess, volume: int) -> None:
        """Which blocks differ between the sites now."""
        other = self.layout.volumes[volume][1 - process.site]
        here = process.machine.files[f"volume {volume}"].cache
        there = process.network.processes[str(other)].machine.files[f"volume {volume}"].cache
        differ = {
            at // BITMAP_BLOCK for at in range(0, len(here), BITMAP_BLOCK)
            if here[at : at + BITMAP_BLOCK] != there[at : at + BITMAP_BLOCK]
        }  # fmt: skip
        self.differed_bytes += len(differ) * BITMAP_BLOCK
        self._allowed[volume] = self._allowed.get(volume, set()) | differ

    # takeovers

    def taken_over(self, role: Takeover) -> None:
        """A takeover is done."""
        report = role.report
        if report.dry_run:
            return
        low = min([self.validate_sent, *self.goes_back_to.values(), *(each[0] for each in self.kept.values())])
        if not report.missing:
            demand(report.number >= low, f"took over at {report.number}, validated {self.validate_sent}")
        lost = [write for write in self.history.writes_above(report.number) if write.number <= self.completed]
        demand(not (report.lossless and lost), f"5: a takeover that called itself lossless lost {len(lost)} writes")
        if report.drained and self.in_pair:
            demand(not lost, f"5: a drained takeover at {report.number} lost {len(lost)} of {self.completed}")
        if role._intermediate and not report.completed and not self.journal_lost:
            count = sum(len(write.ops) for write in lost)
            demand(report.lost_writes >= count or report.drained, f"says {report.lost_writes} are lost, not {count}")
        demand(
            report.lost_writes <= max(0, self.numbered - report.number),
            f"says {report.lost_writes} are lost above {report.number}, of {self.numbered}",
        )
        if self.taken is None or self.taken[2] != report.epoch:  # a reform that did not reach the intermediate
            self.taken = report.number, report.drained and not report.completed and self.in_pair, report.epoch
        demand(self.taken[0] == report.number, f"taken over at {self.taken[0]} and at {report.number}")
        self.taken_over_at = report.number

    def activated(self, process: Any) -> None:
        """The first time in an epoch: from now on hosts find there what the takeover's number gives."""
        state = process.host.role.state
        key = process.name, state.epoch
        if not state.rolling or key in self._seen:
            return
        self._seen.add(key)
        self.check_active(process)
        if self._side_epoch[process.site] != state.epoch:
            self._side_epoch[process.site] = state.epoch
            self.sides[process.site] = PairTruth(self.layout)
        self._restart_truth(process)
        self.known_epoch[process.name] = self.welcomed[process.name] = state.epoch.number

    def expected(self, process: Process, volume: int, number: int) -> bytes:
        """What a takeover at a number gives."""
        number_kept, content, _ = self.kept.get(process.name, (0, {}, ""))
        return content[volume] if number and number == number_kept else self.image(volume, number)

    def check_active(self, process: Any) -> None:
        """Invariant 3: the volumes hold exactly image(n)."""
        number = process.host.role.state.number
        for volume in process.volume_ids:
            found = bytes(process.machine.files[f"volume {volume}"].cache)
            if found != self.expected(process, volume, number):
                raise Violation(
                    f"3: {process.name}: volume {volume} is not image({number}){self._guess(volume, found)}"
                )

    def _guess(self, volume: int, found: bytes) -> str:
        for each in reversed(self.records):
            if self.image(volume, each.head.last) == found:
                return f" but image({each.head.last})"
        return ""

    # watermarks and images, while it runs

    def check_watermarks(self, processes: dict[str, Process]) -> None:
        """The order of PROTOCOL.md."""
        for process in processes.values():
            if not process.alive or process.host is None:
                continue
            if isinstance(process, IntermediateProcess):
                self._check_intermediate(process.host.role)
            elif isinstance(process, DataProcess) and process.source is None:
                self._check_target(process.name, process.host.role)

    def _check_intermediate(self, role: Intermediate) -> None:
        streams, state = role.streams, role.state
        self.in_pair = state.pair in (Pair.PAIR, Pair.PFUL) and not state.limited and state.numbering
        demand(streams.validated <= role.durable_number <= role.numbered, "validated <= durable <= numbered")
        demand(streams.sent <= role.durable_number, f"sent {streams.sent} undurable, {role.durable_number} is")
        if not self.journal_lost:
            self.durable = max(self.durable, role.durable_number)
        if role.phase is Phase.SERVING and all(stream.ready for stream in streams.by_node.values()):
            low = streams.valid_counter
            demand(streams.validated <= low, f"validated {streams.validated} > min prepared {low}")

    def _check_target(self, name: str, role: Secondary) -> None:
        if role.phase in (SecondaryPhase.FAILED, SecondaryPhase.ACTIVE):
            return
        self._forget_what_is_discarded(name, role)
        if not role.state.rolling:
            self.goes_back_to.pop(name, None)
        if role.copying.newest is not None:
            self.goes_back_to[name] = role.copying.newest.copy_from
        demand(role.applied <= role.validated <= role.held, f"{name}: applied <= validated <= held")
        self.applied_at[name] = max(self.applied_at.get(name, 0), role.applied)

    def _forget_what_is_discarded(self, name: str, role: Secondary) -> None:
        if role.state.rolling:
            for marks in (self.prepared, self.applied_at):
                marks[name] = min(marks.get(name, 0), role.state.number)

    def check_images(self, processes: dict[str, Process]) -> None:
        """P-VOLs are what hosts may find, and the writes in order; S-VOLs equal image(applied)."""
        for process in processes.values():
            if not process.alive or process.host is None:
                continue
            if isinstance(process, IntermediateProcess):
                self._check_own(process)
            elif isinstance(process, DataProcess):
                if process.source is not None:
                    self._check_source(process)
                elif not process.host._applying:
                    self._check_s_vols(process)

    def _check_own(self, process: IntermediateProcess) -> None:
        role = process.host.role
        quiet = role.state.pair == Pair.PAIR and not role.state.start and role.phase is Phase.SERVING
        if process.host.volumes is None or not role.state.filled or not quiet:
            return
        for volume in self.layout.volumes:
            found = bytes(process.machine.files[f"volume {volume}"].cache)
            if found != self.image(volume, role.durable_number):
                raise Violation(f"intermediate volume {volume} is not image({role.durable_number})")

    def _check_source(self, process: DataProcess) -> None:
        host = process.primary
        if host is None or not host.role.serving:
            return
        for volume in process.volume_ids:
            self.sides[process.site].check_volume(process, volume)
            if host.role.state.suspended or process.source is None or self.journal_lost:
                continue
            number = max(host.role.acked, self.completed_of.get(process.name, 0), self.history.base(volume))
            found = bytes(process.machine.files[f"volume {volume}"].cache)
            current = process.site == self._direction(process)
            if current and found != self.image(volume, number):
                raise Violation(f"{process.name}: P-VOL {volume} is not image({number}){self._guess(volume, found)}")

    @staticmethod
    def _direction(process: Process) -> int:
        middle = process.network.processes[process.layout.intermediate[0]]
        return int(middle.host.role.state.direction) if middle.host is not None else -1

    def _check_s_vols(self, process: DataProcess) -> None:
        role = process.host.role
        if role.state.copying or role.copying.newest is not None or role.phase is not SecondaryPhase.FOLLOWING:
            return
        if role.applied < self.applied_at.get(process.name, 0):
            return
        for volume in process.volume_ids:
            found = bytes(process.machine.files[f"volume {volume}"].cache)
            if found != self.image(volume, role.applied):
                guess = self._guess(volume, found)
                raise Violation(f"{process.name}: S-VOL {volume} is not image({role.applied}){guess}")

    def check_on_platter(self, process: Process, number: int) -> None:
        """Invariant 1: cut the intermediate's power now; the record is there."""
        if self.journal_lost:
            return
        file = process.machine.files["journal"].copy()
        file.power_cut(self.world.random, self.world.random.choice([512, 4096]))
        found = recovered_number(file, process.node_id, self.layout.ring_bytes)
        demand(found >= number, f"1: {number} was acknowledged; after a power cut the journal ends at {found}")


def _blocks(head: RecordHead, record: memoryview) -> list[tuple[int, int]]:
    """(volume, block of the bitmap) that a record touches."""
    if head.kind != RecordKind.UPDATE:
        return []
    return [
        (volume, block)
        for volume, _, _, offset, length, _ in iterate_entries(head, record)
        for block in range(offset // BITMAP_BLOCK, (offset + length - 1) // BITMAP_BLOCK + 1)
    ]
