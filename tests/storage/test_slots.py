"""State in two slots: whatever is torn, one copy is whole."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from random import Random

import pytest

from blockrepl.errors import DamagedError, IdentityError, InUseError, MissingError, StorageError, UsageError
from blockrepl.formats.slots import SLOT_BYTES, SLOT_HEADER_BYTES, SLOT_PAYLOAD_BYTES, SLOTS_BYTES, SlotKind
from blockrepl.storage import slot_file
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.slot_file import SlotFile
from blockrepl.storage.slots import Identity, Slots
from tests.storage.journals import GROUP
from tests.storage.sim_disk import SimDisk

IDENTITY = Identity(GROUP, 1, SlotKind.STATE)


def load(disk: SimDisk) -> tuple[Slots, bytes]:
    return Slots.load(disk.read(0, SLOTS_BYTES), IDENTITY)


def save(disk: SimDisk, slots: Slots, payload: bytes) -> None:
    offset, raw = slots.encode(payload)
    disk.write(offset, [raw])
    disk.sync()
    slots.stored()


@pytest.mark.parametrize("seed", range(40))
def test_a_torn_write_leaves_the_old_or_the_new_payload(seed: int) -> None:
    random = Random(seed)
    disk, slots = SimDisk(SLOTS_BYTES), Slots(IDENTITY)
    old = b""
    for turn in range(1, 30):
        new = b"%05d" % turn * random.choice([1, 2000])
        if turn == 1:
            save(disk, slots, new)
        else:
            offset, raw = slots.encode(new)
            disk.write(offset, [raw])
            disk.power_cut(random, 512)
            slots, found = load(disk)
            assert found in (old, new)
            again, image = slots.again(found)
            meant = SLOT_HEADER_BYTES + len(found)
            assert disk.read(again, meant) == image[:meant], "repeating changes nothing that counts"
            new = found
        old = new


def test_the_largest_payload_fits_and_a_shorter_one_may_follow() -> None:
    disk, slots = SimDisk(SLOTS_BYTES), Slots(IDENTITY)
    for payload in (b"x" * SLOT_PAYLOAD_BYTES, b"y" * SLOT_PAYLOAD_BYTES, b"z", b""):
        save(disk, slots, payload)
        assert load(disk)[1] == payload
    with pytest.raises(AssertionError):
        slots.encode(b"x" * (SLOT_PAYLOAD_BYTES + 1))


def test_both_slots_are_never_open_at_once() -> None:
    slots = Slots(IDENTITY)
    slots.encode(b"one")
    with pytest.raises(AssertionError):
        slots.encode(b"two")


def test_writes_alternate_between_the_slots() -> None:
    slots = Slots(IDENTITY)
    offsets = []
    for _ in range(4):
        offsets.append(slots.encode(b"")[0])
        slots.stored()
    assert offsets == [SLOT_BYTES, 0, SLOT_BYTES, 0]


def test_every_flipped_bit_of_the_newest_slot_brings_back_the_one_before() -> None:
    disk, slots = SimDisk(SLOTS_BYTES), Slots(IDENTITY)
    save(disk, slots, b"old")
    save(disk, slots, b"new")
    for bit in range(8 * (SLOT_HEADER_BYTES + 3)):
        disk.cache[bit // 8] ^= 1 << bit % 8
        assert load(disk)[1] == b"old"
        disk.cache[bit // 8] ^= 1 << bit % 8
    assert load(disk)[1] == b"new"


def test_zeros_are_missing_and_two_bad_slots_are_damage() -> None:
    disk, slots = SimDisk(SLOTS_BYTES), Slots(IDENTITY)
    with pytest.raises(MissingError):
        load(disk)
    save(disk, slots, b"one")
    disk.cache[SLOT_BYTES + 44] ^= 1
    with pytest.raises(DamagedError):
        load(disk)


def test_somebody_elses_slots_are_refused() -> None:
    disk, slots = SimDisk(SLOTS_BYTES), Slots(IDENTITY._replace(node_id=9))
    save(disk, slots, b"")
    with pytest.raises(IdentityError, match="node 9"):
        load(disk)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_a_state_file_keeps_what_was_saved(path: Path) -> None:
    SlotFile.create(path, IDENTITY, b"first")
    assert path.stat().st_mode & 0o777 == 0o600
    for payload in (b"second", b"third", b"x" * SLOT_PAYLOAD_BYTES):
        file = SlotFile.open(path, IDENTITY)
        file.save_now(payload)
        file.close()
        file = SlotFile.open(path, IDENTITY)
        assert file.payload == payload
        file.close()


def test_a_state_file_is_never_made_twice(path: Path) -> None:
    SlotFile.create(path, IDENTITY, b"first")
    with pytest.raises(UsageError):
        SlotFile.create(path, IDENTITY, b"second")
    assert [each.name for each in path.parent.iterdir()] == ["state"]
    file = SlotFile.open(path, IDENTITY)
    assert file.payload == b"first"
    file.close()


def test_a_state_file_that_is_not_there_is_missing_and_a_second_process_is_told(path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        SlotFile.open(path, IDENTITY)
    assert "mounted" in caught.value.hint
    SlotFile.create(path, IDENTITY, b"")
    file = SlotFile.open(path, IDENTITY)
    with pytest.raises(InUseError):
        SlotFile.open(path, IDENTITY)
    file.close()
    SlotFile.open(path, IDENTITY).close()


def test_another_nodes_state_file_is_refused_and_unlocked_again(path: Path) -> None:
    SlotFile.create(path, IDENTITY, b"")
    with pytest.raises(IdentityError):
        SlotFile.open(path, IDENTITY._replace(group=bytes(16)))
    SlotFile.open(path, IDENTITY).close()


def test_a_state_file_cut_short_is_damaged(path: Path) -> None:
    SlotFile.create(path, IDENTITY, b"")
    os.truncate(path, 5000)
    with pytest.raises(DamagedError):
        SlotFile.open(path, IDENTITY)


async def test_saves_take_turns_and_the_newest_wins(path: Path) -> None:
    SlotFile.create(path, IDENTITY, b"")
    file = SlotFile.open(path, IDENTITY)
    disk = DiskThread(asyncio.get_running_loop(), "test")
    told: list[tuple[int, bytes]] = []
    finished = asyncio.Event()
    for turn in range(50):
        file.save(disk, b"%d" % turn, lambda turn=turn: told.append((turn, file.payload)))  # type: ignore[misc]
    file.save(disk, b"50", finished.set)
    await finished.wait()
    assert [turn for turn, _ in told] == list(range(50)), "each caller is told, in order"
    assert all(int(payload) >= turn for turn, payload in told), "when its payload or a newer one is durable"
    disk.close()
    file.close()
    file = SlotFile.open(path, IDENTITY)
    assert file.payload == b"50"
    file.close()


async def test_a_state_file_fails_for_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SlotFile.create(path, IDENTITY, b"old")
    file = SlotFile.open(path, IDENTITY)
    disk = DiskThread(asyncio.get_running_loop(), "test")
    failed = asyncio.get_running_loop().create_future()
    file.on_failed = failed.set_result

    def bad_sync(fd: int) -> None:
        raise OSError(errno.EIO, "no disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", bad_sync)
        file.save(disk, b"new", lambda: pytest.fail("told that it is durable"))
        assert isinstance(await failed, StorageError)
    with pytest.raises(StorageError):
        file.save(disk, b"newer", lambda: None)
    with pytest.raises(StorageError):
        file.save_now(b"newer")
    disk.close()
    file.close()


def test_making_a_file_in_a_directory_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        slot_file.SlotFile.create(tmp_path / "no" / "state", IDENTITY, b"")
