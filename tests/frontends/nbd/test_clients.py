"""Clients that other people wrote."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.frontends.nbd.conftest import SIZE, Rig


async def run(*command: str) -> str:
    """Run a client while the server serves; its output. Skips when it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    return output


async def test_nbdinfo_lists_and_describes_the_exports(rig: Rig) -> None:
    rig.add("ro", writable=False, block=4096, size_bytes=1 << 20)
    described = json.loads(await run("nbdinfo", "--json", "--no-content", "--list", rig.uri("").rstrip("/")))["exports"]
    exports = {export["export-name"]: export for export in described}
    assert set(exports) == {"data", "ro"}
    assert exports["data"]["export-size"] == SIZE
    assert exports["data"]["block_size_minimum"] == 512
    assert exports["ro"]["block_size_minimum"] == 4096
    assert exports["data"]["can_multi_conn"]
    assert not exports["data"]["is_read_only"]
    assert exports["ro"]["is_read_only"]


async def test_nbdcopy_brings_an_image_there_and_back(rig: Rig, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    with source.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.seek(32 << 20)
        file.write(os.urandom(3 << 20))
        file.truncate(SIZE)
    await run("nbdcopy", "--flush", str(source), rig.uri())
    await run("nbdcopy", rig.uri(), str(back))
    assert source.read_bytes() == back.read_bytes() == (tmp_path / "data.img").read_bytes()


async def test_qemu_io_writes_patterns_and_verifies_them(rig: Rig) -> None:
    commands = [
        "write -P 0xaa 0 1M",
        "write -f -P 0xbb 512k 4k",
        "write -z 600k 64k",
        "discard 0 64k",
        "flush",
        "read -P 0xaa 64k 448k",
        "read -P 0xbb 512k 4k",
        "read -P 0 600k 64k",
        "read -P 0xaa 664k 360k",
        "aio_write -P 0xcc 2M 1M",
        "aio_flush",
        "read -P 0xcc 2M 1M",
    ]
    arguments = [word for command in commands for word in ("-c", command)]
    output = await run("qemu-io", "-f", "raw", rig.uri(), *arguments)
    assert "Pattern verification failed" not in output


async def test_qemu_img_converts_and_compares(rig: Rig, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 << 20) + bytes(SIZE - (2 << 20)))
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), rig.uri())
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), rig.uri())


async def test_fio_verifies_what_several_jobs_wrote(rig: Rig, tmp_path: Path) -> None:
    if shutil.which("fio") is not None and "nbd" not in await run("fio", "--enghelp"):
        pytest.skip("this fio has no nbd engine")
    job = tmp_path / "job.fio"
    job.write_text(
        "[global]\nioengine=nbd\n"
        f"uri={rig.uri()}\nthread\nverify=crc32c\nverify_fatal=1\nsize=8m\nrandrepeat=1\n"
        "[small]\nrw=randwrite\nbs=4k\niodepth=32\noffset=0\n"
        "[mixed]\nrw=randrw\nbsrange=512-64k\nblockalign=512\niodepth=16\noffset=16m\n"
        "[large]\nrw=write\nbs=1m\niodepth=8\noffset=32m\nfsync=4\n"
        "[trim]\nrw=randtrimwrite\nbs=4k\niodepth=8\noffset=48m\nverify=0\n"
    )
    output = await run("fio", "--output-format=json", f"--aux-path={tmp_path}", str(job))
    result = json.loads(output[output.index("{") :])
    assert [entry["error"] for entry in result["jobs"]] == [0, 0, 0, 0]
