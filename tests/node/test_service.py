"""A node that made a mistake dies at once; any other error of a callback is logged and the node goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blockrepl.node.service import MISTAKE_STATUS

PROGRAM = """
import asyncio, uvloop
from blockrepl.node.service import fail_stop

def callback():
    raise {error}("planted")

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(fail_stop)
    loop.call_soon(callback)
    await asyncio.sleep(0)
    await asyncio.sleep(0)

uvloop.run(main())
"""


@pytest.mark.parametrize(("error", "status"), [("AssertionError", MISTAKE_STATUS), ("OSError", 0)])
def test_a_failed_assertion_ends_the_process_and_another_error_is_only_logged(error: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(error=error)], capture_output=True, text=True)
    assert done.returncode == status
    assert "planted" in done.stderr
