"""Layouts and numbers of the kernel's loop driver.

Source: linux/include/uapi/linux/loop.h (LOOP_CONFIGURE since Linux 5.8). Host byte order.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from construct import Array, Bytes, Int32un, Int64un, Struct

NAME_BYTES = 64  # LO_NAME_SIZE
KEY_BYTES = 32  # LO_KEY_SIZE
MAJOR = 7  # linux/include/uapi/linux/major.h, LOOP_MAJOR


class Ioctl(IntEnum):
    """ioctl(2) requests: on /dev/loopN, the last on /dev/loop-control."""

    CLR_FD = 0x4C01
    SET_STATUS64 = 0x4C04
    GET_STATUS64 = 0x4C05
    SET_CAPACITY = 0x4C07
    CONFIGURE = 0x4C0A
    CTL_GET_FREE = 0x4C82


class LoopFlag(IntFlag):
    """LO_FLAGS_*."""

    READ_ONLY = 1
    AUTOCLEAR = 4  # the device frees itself when its last user closes it
    PARTSCAN = 8
    DIRECT_IO = 16


loop_info64 = Struct(
    "device" / Int64un,
    "inode" / Int64un,
    "rdevice" / Int64un,
    "offset_bytes" / Int64un,
    "size_limit_bytes" / Int64un,  # 0: the whole file
    "number" / Int32un,
    "encrypt_type" / Int32un,
    "encrypt_key_size_bytes" / Int32un,
    "flags" / Int32un,  # LoopFlag
    "file_name" / Bytes(NAME_BYTES),
    "crypt_name" / Bytes(NAME_BYTES),
    "encrypt_key" / Bytes(KEY_BYTES),
    "init" / Array(2, Int64un),
)
assert loop_info64.sizeof() == 232

loop_config = Struct(
    "fd" / Int32un,
    "block_size_bytes" / Int32un,
    "info" / loop_info64,
    "reserved" / Array(8, Int64un),
)
assert loop_config.sizeof() == 304
