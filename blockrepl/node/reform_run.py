"""Runs the opener of a reform over real links: `pair resync --swap` and `replace`."""

from __future__ import annotations

import os
from typing import Any

from blockrepl.definition import Definition, Node
from blockrepl.errors import UsageError
from blockrepl.node.opener_run import OpenerRun
from blockrepl.replication.reform import Phase, Reform
from blockrepl.replication.reform_plan import Question


def question(
    definition: Definition,
    node: Node,
    *,
    replaced: str = "",
    force: bool = False,
    verify: bool = False,
    planned: bool = False,
) -> Question:
    """Make ``node``'s site the source. Raises UsageError when a target has no address to be dialled at."""
    direction = node.site
    sources, targets = definition.sources(direction), definition.targets(direction)
    mute = [each for each in (*sources, *targets) if each.listen is None]
    if mute:
        names = ", ".join(each.name for each in mute)
        raise UsageError(
            f"{definition.path}: {names} has no `listen` address: nobody can reach it as a target",
            hint=f'add listen = "127.0.0.1:7111" to the [[node]] of {mute[0].name}, and start it again',
        )
    return Question(
        direction=direction,
        sources=[each.id for each in sources],
        targets=[each.id for each in targets],
        pairs={
            volume.id: (definition.end(volume, direction).id, definition.end(volume, 1 - direction).id)
            for volume in definition.volumes if volume.replicated
        },
        names={each.id: each.name for each in definition.nodes},
        replaced=definition.node(replaced).id if replaced else 0,
        force=force,
        verify=verify,
        planned=planned,
    )  # fmt: skip


class ReformRun(OpenerRun):
    """One reform."""

    async def run(self, asked: Question, *, dry_run: bool) -> dict[str, Any]:
        """Returns the report as the control protocol has it. Raises UsageError when the reform fails."""
        definition, node = self.definition, self.node
        role = Reform(
            group=definition.group_id.bytes, node=node.id, name=node.name, intermediate=definition.intermediate.id,
            question=asked, new_id=lambda: os.urandom(16), now_s=self.clock.now_s(), dry_run=dry_run,
        )  # fmt: skip
        await self.play(role)
        if role.phase is not Phase.DONE:
            raise UsageError(f"not done: {role.problem}", hint=role.hint)
        return self._result(role, asked, dry_run=dry_run)

    def _result(self, role: Reform, asked: Question, *, dry_run: bool) -> dict[str, Any]:
        made, epoch, names = role.plan, role.epoch, asked.names
        volumes = {volume.id: volume.name for volume in self.definition.volumes}
        return {
            "schema": 1,
            "group": self.definition.name,
            "dry_run": dry_run,
            "epoch": {"number": epoch.number, "id": epoch.id.hex()},
            "number": made.number,
            "direction": made.direction,
            "sources": [names[node] for node in asked.sources],
            "targets": [names[node] for node in asked.targets],
            "verify": made.verify,
            "initial": made.initial,
            "full": [volumes[volume] for volume in made.full],
            "out_of_sync_bytes": made.dirty_bytes,
            "reasons": made.reasons,
        }
