"""`blockrepl serve`: one node in the foreground, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
from typing import Any

import uvloop

from blockrepl.definition import Definition
from blockrepl.frontends.loop.system import mark_io_flusher
from blockrepl.node.base import NodeBase

log = logging.getLogger("blockrepl.node")
MISTAKE_STATUS = 70  # EX_SOFTWARE of sysexits.h


def make_node(definition: Definition, name: str, *, alone: bool) -> NodeBase:
    """The node called ``name``, its files opened and recovered. Raises BlockreplError."""
    node = definition.node(name)
    if node.role != "intermediate":
        # Before any thread is started: they inherit it. Without the privilege it works too, but for a machine that is
        # short of memory.
        mark_io_flusher()
    # A role's modules are loaded by its own nodes only: a restart is a recovery, and that counts.
    if node.role == "intermediate":
        from blockrepl.node.intermediate_node import IntermediateNode

        return IntermediateNode(definition, node, alone=alone)
    from blockrepl.node.data_node import DataNode

    return DataNode(definition, node, alone=alone)


def fail_stop(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The loop's handler of what a callback raised.

    A failed assertion is a mistake of ours, and what the role now thinks may be wrong: the process dies as by kill -9,
    which its recovery is made for. Anything else is logged.
    """
    error = context.get("exception")
    if isinstance(error, AssertionError):
        log.critical("a mistake of our own, stopping at once: %s", context.get("message"), exc_info=error)
        logging.shutdown()
        os._exit(MISTAKE_STATUS)
    loop.default_exception_handler(context)


async def serve(definition: Definition, name: str, *, alone: bool = False) -> None:
    """Run a node until SIGTERM, SIGINT or the control command "stop". Raises BlockreplError."""
    node = make_node(definition, name, alone=alone)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(fail_stop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.stopping.set)
    try:
        await node.start()
        log.info("node %s of group %s runs", name, definition.name)
        await node.stopping.wait()
        log.info("stopping")
    finally:
        await node.stop()
    log.info("stopped")


def run(definition: Definition, name: str, *, alone: bool = False) -> None:
    """As `serve`, on a loop of its own."""
    _allow_many_files()
    # Batches, views and actions come and go by reference counts; the collector has nothing to find among them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    uvloop.run(serve(definition, name, alone=alone))


def _allow_many_files() -> None:
    """Debian gives 1024 descriptors and allows many more; a thousand silent connections must not lock anybody out."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
