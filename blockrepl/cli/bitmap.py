"""``bitmap``: what dirty bitmaps say, whether their node runs or not."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from blockrepl.cli.client import call
from blockrepl.cli.output import bytes_text, console, print_json
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.definition import Definition, Node
from blockrepl.errors import NotRunningError
from blockrepl.node.control_messages import Message


def bitmap(
    target: Target = None,
    file: File = None,
    node: Annotated[str | None, typer.Option("--node", metavar="NAME", help="Whose; all of this machine else.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, metavar="N", help="At most N ranges of each; 0: all.")] = 10,
    as_json: Json = False,
) -> None:
    """Print dirty bitmaps: blocks that the other end may lack.

    A source's are of hop 1, the intermediate's of hop 2, a split secondary's of what its hosts wrote.
    """
    definition = find(target, file)
    nodes = [definition.node(node)] if node is not None else list(definition.local_nodes())
    found = [_of(definition, each) for each in nodes]
    if as_json:
        print_json({"schema": 1, "group": definition.name, "nodes": found})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("NODE", "VOLUME", "OFFSET", "LENGTH", "DIRTY"):
        table.add_column(name, justify="right" if name in ("OFFSET", "LENGTH", "DIRTY") else "left")
    for each in found:
        for volume in each["volumes"]:
            table.add_row(each["node"], volume["volume"], "", "", bytes_text(volume["dirty_bytes"]))
            for run in volume["ranges"][: limit or None]:
                table.add_row("", "", str(run["offset_bytes"]), str(run["length_bytes"]), "")
            if limit and len(volume["ranges"]) > limit:
                table.add_row("", "", "…", "", f"{len(volume['ranges']) - limit} more: --limit 0")
    console().print(table)


def _of(definition: Definition, node: Node) -> Message:
    """From the node, or from its files when it does not run."""
    try:
        return call(node.directory, "bitmap", {})
    except NotRunningError:
        from blockrepl.node.bitmap_report import bitmap_report
        from blockrepl.node.bitmaps import bitmap_identity, bitmap_path, bitmapped
        from blockrepl.storage.bitmap_file import BitmapFile

        volumes = bitmapped(definition, node)
        bitmaps = {v.id: BitmapFile.read(bitmap_path(node, v), bitmap_identity(definition, node, v)) for v in volumes}
        names = {volume.id: volume.name for volume in volumes}
        return {"node": node.name, "volumes": bitmap_report(bitmaps, names), "trusted": None, "open_writes": []}
