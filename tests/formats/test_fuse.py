"""Layouts of FUSE and of the loop driver, checked against each other and against the kernel's own header."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from blockrepl.formats import fuse, loop

HEADER = {
    "length_bytes": 0x01020304, "opcode": 16, "unique": 0x1122334455667788, "node_id": 1, "uid": 2, "gid": 3, "pid": 4,
    "total_extension_words": 5, "padding": 0,
}  # fmt: skip
IO = {
    "handle": 9, "offset_bytes": 1 << 41, "length_bytes": 4096,
    "io_flags": 6, "lock_owner": 7, "flags": 8, "padding": 0,
}  # fmt: skip


def test_hot_formats_equal_the_declarations() -> None:
    header, io = fuse.fuse_in_header.build(HEADER), fuse.fuse_io_in.build(IO)
    assert fuse.IN_HEADER.unpack(header) == tuple(HEADER.values())
    assert fuse.IO_REQUEST.unpack(header + io) == (
        *(HEADER[name] for name in ("length_bytes", "opcode", "unique")),
        *(IO[name] for name in ("offset_bytes", "length_bytes")),
    )
    out = fuse.fuse_out_header.build({"length_bytes": 24, "error": -5, "unique": 77})
    assert fuse.OUT_HEADER.pack(24, -5, 77) == out
    assert fuse.WRITE_REPLY.pack(24, -5, 77, 4096, 0) == out + fuse.fuse_write_out.build(
        {"length_bytes": 4096, "padding": 0}
    )


KERNEL_SIZES = {
    "fuse_in_header": fuse.fuse_in_header, "fuse_out_header": fuse.fuse_out_header, "fuse_init_out": fuse.fuse_init_out,
    "fuse_attr": fuse.fuse_attr, "fuse_attr_out": fuse.fuse_attr_out, "fuse_open_in": fuse.fuse_open_in,
    "fuse_open_out": fuse.fuse_open_out, "fuse_read_in": fuse.fuse_io_in, "fuse_write_in": fuse.fuse_io_in,
    "fuse_write_out": fuse.fuse_write_out, "fuse_fallocate_in": fuse.fuse_fallocate_in,
    "fuse_statfs_out": fuse.fuse_statfs_out, "loop_info64": loop.loop_info64, "loop_config": loop.loop_config,
}  # fmt: skip
KERNEL_NUMBERS = {
    **{f"FUSE_{opcode.name}": int(opcode) for opcode in fuse.Opcode},
    **{f"FUSE_{flag.name}": int(flag) for flag in fuse.InitFlag},
    **{f"FOPEN_{flag.name}": int(flag) for flag in fuse.OpenFlag},
    **{f"LOOP_{request.name}": int(request) for request in loop.Ioctl},
    **{f"LO_FLAGS_{flag.name}": int(flag) for flag in loop.LoopFlag},
    "FUSE_MIN_READ_BUFFER": fuse.MIN_READ_BUFFER_BYTES,
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(not Path("/usr/include/linux/fuse.h").exists(), reason="no kernel headers (linux-libc-dev)")
def test_sizes_and_numbers_equal_those_of_the_kernel_headers(tmp_path: Path) -> None:
    checks = [
        f"_Static_assert(sizeof(struct {name}) == {layout.sizeof()}, {name!r});"
        for name, layout in KERNEL_SIZES.items()
    ]
    checks += [f"_Static_assert({name} == {value}, {name!r});" for name, value in KERNEL_NUMBERS.items()]
    source = tmp_path / "check.c"
    source.write_text("#include <linux/fuse.h>\n#include <linux/loop.h>\n" + re.sub("'", '"', "\n".join(checks)) + "\n")
    result = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
