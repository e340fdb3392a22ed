"""QEMU's iSCSI driver: another initiator (libiscsi), another idea of what a disk is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.iscsi.groups import PLAIN_NODE, PlainGroup, url
from tests.patience import patient

MIB = 1 << 20
TIMEOUT_S = patient(100)


def run(*argv: str) -> str:
    """A tool of QEMU to its end. Skips when it, or its iSCSI driver, is not installed."""
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if "Unknown protocol 'iscsi'" in done.stderr or "Unknown driver 'iscsi'" in done.stderr:
        pytest.skip("QEMU's iSCSI driver is not installed (qemu-block-extra)")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_image_goes_there_and_back(plain: PlainGroup, tmp_path: Path) -> None:
    lun = url(plain, PLAIN_NODE, 0)
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(5 * MIB) + bytes(20 * MIB) + os.urandom(MIB) + bytes(38 * MIB))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), lun)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), lun)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", lun, str(back))
    assert source.read_bytes() == back.read_bytes()
    assert source.read_bytes() == (plain.node(PLAIN_NODE).directory / "data.img").read_bytes()


def test_patterns_are_read_back_as_written(plain: PlainGroup) -> None:
    commands = [
        "write -P 0xaa 0 1M", "write -f -P 0xbb 512k 4k", "write -z 600k 64k", "write -z -u 700k 64k", "discard 0 64k",
        "flush", "read -P 0xaa 64k 448k", "read -P 0xbb 512k 4k", "read -P 0 600k 64k", "read -P 0 700k 64k",
        "read -P 0xaa 764k 260k", "aio_write -P 0xcc 2M 1M", "aio_write -P 0xdd 4M 8M", "aio_flush",
        "read -P 0xcc 2M 1M", "read -P 0xdd 4M 8M", "write -P 0x11 1536 512", "read -P 0x11 1536 512",
        "write -P 0x22 67108352 512", "read -P 0x22 67108352 512",
    ]  # fmt: skip
    arguments = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", "-t", "none", url(plain, PLAIN_NODE, 0), *arguments)
    assert "Pattern verification failed" not in output
    assert output.count("read ") >= 9


def test_a_disk_says_how_large_it_is_and_what_is_allocated(plain: PlainGroup) -> None:
    lun = url(plain, PLAIN_NODE, 0)
    assert "64 MiB" in run("qemu-img", "info", "-f", "raw", lun)
    run("qemu-io", "-f", "raw", lun, "-c", "write -P 1 1M 64k")
    map_ = run("qemu-img", "map", "-f", "raw", "--output=json", lun)
    assert '"start": 0, "length": 1048576, "depth": 0, "present": true, "zero": true' in map_
    assert '"start": 1048576' in map_


@pytest.mark.parametrize("writes", [True, False], ids=["writes", "reads"])
def test_bench_runs_many_commands_at_a_time(plain: PlainGroup, writes: bool) -> None:
    options = ["-w", "--pattern=90"] if writes else []
    output = run(
        "qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "4000", "-d", "64", "-s", "4096", "-S", "20480",
        *options, url(plain, PLAIN_NODE, 0),
    )  # fmt: skip
    assert "Run completed" in output
    if writes:
        assert (plain.node(PLAIN_NODE).directory / "data.img").read_bytes()[:4096] == b"\x5a" * 4096
