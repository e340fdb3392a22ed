"""What a takeover costs, in words: for the takeover itself, its rehearsal, and `explain`."""

from __future__ import annotations

from blockrepl.cli.output import bytes_text
from blockrepl.node.control_messages import Message


def what_is_lost(report: Message) -> list[str]:
    """Lines without a verb in front: "nothing that was acknowledged", "3 writes, 24 KiB, 0.2 s"."""
    if report.get("lossless"):
        return ["nothing that was acknowledged"]
    if report.get("completed_earlier"):
        return ["nothing more than when it was done before"]
    writes, seconds = report.get("lost_writes"), report.get("lost_s")
    span = f", {seconds:.1f} s" if writes and seconds is not None else ""
    if report.get("counted"):
        lines = [f"{writes} writes, {bytes_text(report.get('lost_bytes'))}{span}"]
    elif writes is None:
        lines = ["an unknown number of writes"]
    else:
        held = f", {bytes_text(report.get('lost_bytes'))} of them held here{span}" if writes else ""
        beyond = "" if report.get("drained") else "; whether there are more is not known here"
        lines = [f"{writes} writes that are known{held}{beyond}"]
    if report.get("alone"):
        lines.append(f"and all that hosts at the other site completed alone: {_alone(report.get('alone_bytes'))}")
    if bits := report.get("out_of_sync_bytes"):
        lines.append(f"and what was written while suspended: at most {bytes_text(bits)} in blocks")
    return lines


def _alone(size_bytes: int | None) -> str:
    return "how much is not known here" if size_bytes is None else f"at most {bytes_text(size_bytes)} in blocks"
