from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from scripts.benchlib import iscsi_peers, qemu_img
from scripts.benchlib.fio import IscsiTarget, LoadError
from scripts.benchlib.process import NotAvailableError
from scripts.benchlib.works import MIB, WORKS
from scripts.benchlib.workspace import Workspace
from scripts.ports import free_port

TARGET = IscsiTarget(3260, "iqn.2026-11.org.blockrepl:demo", 2, 64 * MIB)


def test_small_blocks_are_strewn_over_all_of_the_image_and_large_ones_follow_each_other() -> None:
    words = qemu_img.arguments(WORKS["randwrite-4k-qd32"], TARGET, 1000)
    step_bytes = int(words[words.index("-S") + 1])
    blocks = TARGET.size_bytes // 4096
    assert len({step * step_bytes % TARGET.size_bytes for step in range(blocks)}) == blocks
    assert step_bytes > MIB
    assert "-w" in words
    assert words[-1] == "iscsi://127.0.0.1:3260/iqn.2026-11.org.blockrepl:demo/2"
    words = qemu_img.arguments(WORKS["read-1m-qd8"], TARGET, 10)
    assert (words[words.index("-S") + 1], words[words.index("-d") + 1]) == (str(MIB), "8")
    assert "-w" not in words
    assert "--flush-interval=1" in qemu_img.arguments(WORKS["randwrite-4k-qd1-fsync"], TARGET, 10)


def test_time_is_what_it_prints_last_and_silence_is_an_error() -> None:
    assert qemu_img.parse("Sending 10 read requests\nRun completed in 2.246 seconds.\n") == 2.246
    assert qemu_img.parse("Run completed in 0.000 seconds.") > 0
    with pytest.raises(LoadError, match="does not say"):
        qemu_img.parse("Sending 10 read requests\n")


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
def test_target_that_is_not_there_is_an_error_that_says_so() -> None:
    with pytest.raises(LoadError, match="qemu-img bench ended with 1"):
        qemu_img.measure(WORKS["randread-4k-qd32"], IscsiTarget(free_port(), "iqn.x", 0, MIB), 0.01)


@pytest.mark.root
@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
def test_tgt_is_measured_and_gone_afterwards(tmp_path: Path) -> None:
    try:
        with iscsi_peers.tgt(Workspace(tmp_path, 16 * MIB)) as system:
            assert isinstance(system.target, IscsiTarget)
            sample = qemu_img.measure(WORKS["randwrite-4k-qd32"], system.target, 0.01)
            pid = system.pids["tgtd"]
    except NotAvailableError as error:
        pytest.skip(str(error))
    except LoadError as error:
        if "Unknown protocol 'iscsi'" in str(error) or "Unknown driver" in str(error):
            pytest.skip("qemu-block-extra is not installed")
        raise
    assert sample.ops >= 2 * 16 * 32
    assert sample.lat_us_p50 is None
    assert (tmp_path / "tgt.img").read_bytes()[:4096] == b"\xa5" * 4096
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
