"""Storing records in images."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from blockrepl.block import Op
from blockrepl.formats.image import Side
from blockrepl.formats.record import RecordKind, decode_record, encode_record, number_record
from blockrepl.node.store import store_record
from blockrepl.storage.image import ImageFile, ImageIdentity

IDENTITY = ImageIdentity(UUID(int=1), 3, 1, Side.SECONDARY, 1 << 20, 512)


def test_metadata_in_a_record_become_the_volumes_and_leave_its_data_alone(tmp_path: Path) -> None:
    ImageFile.create(tmp_path / "data.img", IDENTITY)
    image = ImageFile.open(tmp_path / "data.img", IDENTITY)
    payloads = [b"w" * 512, b"registrations", b"z" * 512]
    head, _ = encode_record(
        RecordKind.UPDATE, bytes(16), 1, 2, 1, 1, 3, [Op.WRITE, Op.METADATA, Op.WRITE], [0, 1, 0], [0, 0, 1024],
        [512, 13, 512], payloads, 1037,
    )  # fmt: skip
    record = memoryview(bytearray(head + b"".join(payloads)))
    number_record(record, 0, 1, 1, 0, 0)
    assert store_record({3: image}, decode_record(record), record) == {3}
    assert image.metadata() == b"registrations"
    found = memoryview(bytearray(1536))
    image.read(0, found)
    assert found == b"w" * 512 + bytes(512) + b"z" * 512
    image.close()
