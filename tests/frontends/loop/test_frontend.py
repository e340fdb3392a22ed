"""Real loop devices over a real /dev/fuse. Commands that touch a device run in processes of their own."""

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blockrepl.errors import InUseError, UsageError
from blockrepl.frontends.loop import device, system
from blockrepl.frontends.loop.frontend import LoopFrontend
from blockrepl.frontends.loop.leftovers import clean_leftovers, find_leftovers
from tests.frontends.loop.conftest import need, remains
from tests.frontends.loop.volumes import NO_SPACE, FileVolume

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[FileVolume]:
    made = FileVolume(tmp_path / "data.img", 384 * MIB)
    yield made
    made.close()


@pytest.fixture
async def frontend(volume: FileVolume, runtime_dir: Path) -> AsyncIterator[LoopFrontend]:
    made = LoopFrontend(lambda: {"data": volume}, runtime_dir)
    yield made
    volume.relieve()
    volume.release_held()
    await made.close()


async def run(*command: str | Path, code: int = 0) -> str:
    """A command, and its output; fails unless it ends with ``code``."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 60)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    assert process.returncode == code, f"{command} ended with {process.returncode}:\n{out.decode(errors='replace')}"
    return out.decode(errors="replace")


@contextlib.asynccontextmanager
async def mounted(name: str, where: Path) -> AsyncIterator[Path]:
    where.mkdir(exist_ok=True)
    await run("mount", name, where)
    try:
        yield where
    finally:
        await run("umount", where)


async def serve(runtime_dir: Path, tmp_path: Path, volume: FileVolume) -> tuple[asyncio.subprocess.Process, str]:
    """child.py over the volume's file, and its device."""
    arguments = (str(tmp_path / "data.img"), str(volume.size_bytes), str(runtime_dir))
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.frontends.loop.child", *arguments, stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    return server, (await server.stdout.readline()).decode().strip()


def queue(name: str, attribute: str) -> str:
    return (device.sysfs(name) / attribute).read_text().strip()


async def test_the_device_has_the_volume_s_size_block_size_and_direct_io(
    frontend: LoopFrontend, volume: FileVolume
) -> None:
    name = await frontend.attach("data")
    assert frontend.attached() == {"data": name}
    assert int(queue(name, "size")) * 512 == volume.size_bytes
    assert queue(name, "queue/logical_block_size") == "4096"
    assert queue(name, "loop/dio") == "1"
    assert queue(name, "ro") == "0"
    assert await frontend.attach("data") == name
    await frontend.detach("data")
    assert device.backing_file(name) is None
    assert frontend.attached() == {}


async def test_blocks_of_512_bytes_are_offered_where_the_volume_has_them(tmp_path: Path, runtime_dir: Path) -> None:
    volume = FileVolume(tmp_path / "small.img", 8 * MIB + 512, 512)
    frontend = LoopFrontend(lambda: {"small": volume}, runtime_dir)
    try:
        name = await frontend.attach("small")
        assert queue(name, "queue/logical_block_size") == "512"
        assert int(queue(name, "size")) * 512 == 8 * MIB + 512
        last = os.urandom(512)
        (tmp_path / "last").write_bytes(last)
        await run("dd", f"if={tmp_path / 'last'}", f"of={name}", "bs=512", f"seek={8 * MIB // 512}", "oflag=direct")
        assert os.pread(volume.fd, 512, 8 * MIB) == last
    finally:
        await frontend.close()
        volume.close()


async def test_a_volume_that_is_not_writable_gives_a_read_only_device(tmp_path: Path, runtime_dir: Path) -> None:
    volume = FileVolume(tmp_path / "secondary.img", 8 * MIB, writable=False)
    frontend = LoopFrontend(lambda: {"secondary": volume}, runtime_dir)
    try:
        name = await frontend.attach("secondary")
        assert queue(name, "ro") == "1"
        await run("dd", f"if={name}", "of=/dev/null", "bs=1M", "iflag=direct")
        await run("dd", "if=/dev/zero", f"of={name}", "bs=4k", "count=1", "oflag=direct", code=1)
        await frontend.detach("secondary")
    finally:
        await frontend.close()
        volume.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mkfs", "fsck"),
    [
        (["mkfs.ext4", "-q", "-F"], ["e2fsck", "-f", "-n"]),
        (["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n"]),
        (["mkfs.btrfs", "-q", "-f"], ["btrfs", "check"]),
    ],
    ids=["ext4", "xfs", "btrfs"],
)
async def test_a_file_system_keeps_what_fio_wrote_and_is_clean_afterwards(
    frontend: LoopFrontend, volume: FileVolume, tmp_path: Path, mkfs: list[str], fsck: list[str]
) -> None:
    need(mkfs[0], fsck[0], "fio")
    name = await frontend.attach("data")
    await run(*mkfs, name)
    async with mounted(name, tmp_path / "mnt") as where:
        with pytest.raises(UsageError, match=f"mounted on {where}"):
            await frontend.detach("data")
        await run(
            "fio", "--name=v", f"--directory={where}", "--size=24M", "--rw=randrw",
            "--bsrange=4k-256k", "--verify=crc32c", "--verify_state_save=0",
            "--direct=1", "--ioengine=libaio", "--iodepth=16", "--numjobs=2", "--fsync=32", "--end_fsync=1",
        )  # fmt: skip
        flushes = volume.flushes
        await run("sync", "-f", where)
        (await run("fstrim", where)) if mkfs[0] != "mkfs.btrfs" else None
        assert mkfs[0] == "mkfs.btrfs" or volume.trimmed
        assert flushes > 0
    await run(*fsck, name)
    await frontend.detach("data")
    assert device.backing_file(name) is None


async def test_discards_are_trims_and_write_zeroes_are_zeros(
    frontend: LoopFrontend, volume: FileVolume, tmp_path: Path
) -> None:
    need("blkdiscard")
    name = await frontend.attach("data")
    os.pwrite(volume.fd, b"\xff" * (4 * MIB), 0)
    await run("blkdiscard", "-o", "0", "-l", str(MIB), name)
    assert sum(length for _, length in volume.trimmed) == MIB
    await run("blkdiscard", "-z", "-o", str(2 * MIB), "-l", str(MIB), name)
    assert sum(length for _, length in volume.zeroed + volume.trimmed) == 2 * MIB
    assert os.pread(volume.fd, 4 * MIB, 0) == bytes(MIB) + b"\xff" * MIB + bytes(MIB) + b"\xff" * MIB


async def test_errors_of_the_volume_reach_the_host(frontend: LoopFrontend, volume: FileVolume) -> None:
    name = await frontend.attach("data")
    volume.failing = NO_SPACE
    out = await run("dd", "if=/dev/zero", f"of={name}", "bs=4k", "count=1", "oflag=direct", code=1)
    assert os.strerror(errno.ENOSPC) in out
    volume.failing = None
    await run("dd", "if=/dev/zero", f"of={name}", "bs=4k", "count=1", "oflag=direct")


async def test_a_congested_volume_holds_the_host_back_until_it_is_relieved(
    frontend: LoopFrontend, volume: FileVolume
) -> None:
    name = await frontend.attach("data")
    volume.jam = True
    writer = asyncio.create_task(run("dd", "if=/dev/zero", f"of={name}", "bs=4k", "count=8", "oflag=direct"))
    await volume.waiting.wait()
    assert volume.batch_lengths == []
    volume.relieve()
    await writer
    assert sum(volume.batch_lengths) == 8


async def test_writes_that_complete_late_are_answered_then(frontend: LoopFrontend, volume: FileVolume) -> None:
    need("fio")
    name = await frontend.attach("data")
    volume.holding = True
    writer = asyncio.create_task(
        run(
            "fio",
            "--name=v",
            f"--filename={name}",
            "--size=4M",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--ioengine=libaio",
            "--direct=1",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--verify_state_save=0",
        )
    )
    await volume.waiting.wait()
    assert volume.batch_lengths == []
    volume.release_held()
    await writer


async def test_a_device_that_a_process_has_open_is_not_detached(frontend: LoopFrontend) -> None:
    name = await frontend.attach("data")
    sleeper = await asyncio.create_subprocess_exec("sleep", "60", stdin=await asyncio.to_thread(_open_elsewhere, name))
    try:
        with pytest.raises(UsageError, match=f"open in process {sleeper.pid}"):
            await frontend.detach("data")
        assert device.backing_file(name) is not None
        await run("dd", f"if={name}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct")
    finally:
        sleeper.kill()
        await sleeper.wait()
        os.close(_OPENED.pop())
    await frontend.detach("data")


_OPENED: list[int] = []


def _open_elsewhere(name: str) -> int:
    _OPENED.append(os.open(name, os.O_RDONLY))
    return _OPENED[-1]


async def test_the_end_of_the_node_leaves_nothing_even_if_the_device_is_mounted(
    frontend: LoopFrontend, runtime_dir: Path, tmp_path: Path
) -> None:
    need("mkfs.ext4")
    name = await frontend.attach("data")
    await run("mkfs.ext4", "-q", "-F", name)
    async with mounted(name, tmp_path / "mnt"):
        await frontend.close()
        await run("dd", f"if={name}", "of=/dev/null", "bs=4k", "count=1", "skip=90000", "iflag=direct", code=1)
    assert device.backing_file(name) is None
    assert remains(runtime_dir) == []


async def test_only_one_process_owns_the_directory(
    frontend: LoopFrontend, volume: FileVolume, runtime_dir: Path
) -> None:
    await frontend.attach("data")
    assert find_leftovers(runtime_dir) == []
    assert clean_leftovers(runtime_dir) == []
    with pytest.raises(InUseError):
        await LoopFrontend(lambda: {"data": volume}, runtime_dir).attach("data")
    assert frontend.attached()


async def test_a_name_that_is_no_volume_is_refused(frontend: LoopFrontend) -> None:
    with pytest.raises(UsageError, match="no volume other"):
        await frontend.attach("other")
    with pytest.raises(UsageError, match="not attached"):
        await frontend.detach("data")


async def test_a_device_that_someone_freed_is_made_anew(frontend: LoopFrontend) -> None:
    await asyncio.to_thread(device.free, await frontend.attach("data"))
    name = await asyncio.wait_for(frontend.attach("data"), 30)
    await run("dd", f"if={name}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct")


async def test_a_killed_server_is_a_dead_disk_for_the_file_system_on_it(
    runtime_dir: Path, tmp_path: Path, volume: FileVolume
) -> None:
    need("mkfs.ext4")
    server, name = await serve(runtime_dir, tmp_path, volume)
    await run("mkfs.ext4", "-q", "-F", name)
    async with mounted(name, tmp_path / "mnt") as where:
        server.kill()
        await server.wait()
        out = await run("dd", "if=/dev/zero", f"of={where / 'file'}", "bs=64k", "count=64", "conv=fsync", code=1)
        assert os.strerror(errno.EIO) in out or os.strerror(errno.EROFS) in out
        clean_leftovers(runtime_dir)
    assert device.backing_file(name) is None
    assert remains(runtime_dir) == []


async def test_a_mount_that_someone_took_away_is_noticed_and_made_anew(
    frontend: LoopFrontend, runtime_dir: Path, volume: FileVolume
) -> None:
    name = await frontend.attach("data")
    await asyncio.to_thread(device.free, name)
    await asyncio.to_thread(system.unmount, str(runtime_dir / "loop" / "data"), lazily=True)
    name = await asyncio.wait_for(frontend.attach("data"), 30)
    await run("dd", f"if={name}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct")


@pytest.mark.slow
async def test_users_of_a_killed_server_get_eio_and_the_next_one_cleans_up(
    runtime_dir: Path, tmp_path: Path, volume: FileVolume
) -> None:
    need("fio")
    server, name = await serve(runtime_dir, tmp_path, volume)
    try:
        writer = asyncio.create_task(
            run(
                "fio",
                "--name=w",
                f"--filename={name}",
                "--rw=randwrite",
                "--bs=4k",
                "--iodepth=32",
                "--direct=1",
                "--ioengine=libaio",
                "--time_based",
                "--runtime=60",
                code=1,
            )
        )
        assert server.stdout is not None
        assert await server.stdout.readline() == b"busy\n"
    finally:
        server.kill()
        await server.wait()
    assert "Input/output error" in await writer
    found = find_leftovers(runtime_dir)
    assert sorted(leftover.kind for leftover in found) == ["device", "mount"]
    assert found[0].path == name
    frontend = LoopFrontend(lambda: {"data": volume}, runtime_dir)
    try:
        await run("dd", f"if={await frontend.attach('data')}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct")
        await frontend.detach("data")
    finally:
        await frontend.close()
    assert find_leftovers(runtime_dir) == []


async def test_leftovers_that_are_still_open_free_themselves_with_their_last_user(
    runtime_dir: Path, tmp_path: Path, volume: FileVolume
) -> None:
    server, name = await serve(runtime_dir, tmp_path, volume)
    fd = await asyncio.to_thread(os.open, name, os.O_RDONLY)
    server.kill()
    await server.wait()
    try:
        done = clean_leftovers(runtime_dir)
        assert any(name in phrase and "frees itself" in phrase for phrase in done)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, 4096, 0)
    finally:
        os.close(fd)
    assert device.backing_file(name) is None
    assert remains(runtime_dir) == []
