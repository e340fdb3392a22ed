"""Runs the opener of a takeover over real links."""

from __future__ import annotations

import os
from typing import Any

from blockrepl.errors import UsageError
from blockrepl.node.create import image_path
from blockrepl.node.opener_run import OpenerRun
from blockrepl.replication.takeover import Phase, Takeover


class TakeoverRun(OpenerRun):
    """One takeover."""

    async def run(
        self, *, dry_run: bool, force: bool, writable: bool, marker: str = "", planned: bool = False
    ) -> dict[str, Any]:
        """Returns the report as the control protocol has it. Raises UsageError when the takeover fails."""
        definition, node = self.definition, self.node
        role = Takeover(
            group=definition.group_id.bytes, node=node.id, name=node.name, intermediate=definition.intermediate.id,
            secondaries=[each.id for each in definition.sources(node.site)],
            names={each.id: each.name for each in definition.nodes}, new_id=lambda: os.urandom(16),
            now_s=self.clock.now_s(), dry_run=dry_run, force=force, writable=writable, marker=marker,
            fence_never=definition.group.fence == "never", planned=planned,
        )  # fmt: skip
        await self.play(role)
        if role.phase is not Phase.DONE:
            raise UsageError(f"no takeover: {role.problem}", hint=role.hint)
        return self._result(role, started_writable=writable)

    def _result(self, role: Takeover, *, started_writable: bool) -> dict[str, Any]:
        report, definition = role.report, self.definition
        names = {each.id: each.name for each in definition.nodes}
        members = {names[member] for member in report.members}
        ends = [(volume, definition.end(volume, self.node.site)) for volume in definition.volumes if volume.replicated]
        return {
            "schema": 1,
            "group": definition.name,
            "dry_run": report.dry_run,
            "epoch": {"number": report.epoch, "id": report.epoch_id},
            "number": report.number,
            "drained": report.drained,
            "without": report.without,
            "completed_earlier": report.completed,
            "pair": report.pair,
            "copying": report.copying,
            "initial": report.initial,
            "rolled_back_from": report.rolled_back_from,
            "lost_writes": report.lost_writes,
            "lost_s": report.lost_s,
            "out_of_sync_bytes": report.out_of_sync_bytes,
            "split_bytes": report.split_bytes,
            "lost_bytes": report.lost_bytes,
            "counted": report.counted,
            "alone": report.alone,
            "lossless": report.lossless,
            "discarded_writes": report.discarded_writes,
            "missing": [names[node] for node in report.missing],
            "volumes": [
                {
                    "name": volume.name, "node": end.name, "writable": started_writable,
                    "image": str(image_path(end, volume)),
                }
                for volume, end in ends
                if end.name in members
            ],
        }  # fmt: skip
