"""The guest's root file system, made of unpacked packages: an archive in memory, modules and programs in it."""

from __future__ import annotations

import lzma
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.lab import packages
from tests.lab.cpio import Archive
from tests.lab.packages import LAB, LabUnavailableError

MODULES = ("virtio_pci", "virtio_net", "crc32c_generic", "ext4", "sd_mod", "iscsi_tcp", "nbd")
PROGRAMS = (
    ("open-iscsi", "iscsid"), ("open-iscsi", "iscsiadm"), ("nbd-client", "nbd-client"),
    ("e2fsprogs", "mke2fs"), ("e2fsprogs", "e2fsck"),
)  # fmt: skip
INITIATOR = "iqn.2026-11.org.blockrepl.lab:guest"
_MKE2FS = """\
[defaults]
    base_features = sparse_super,filetype,resize_inode,dir_index,ext_attr
    default_mntopts = acl,user_xattr
    blocksize = 4096
    inode_size = 256
    inode_ratio = 16384
[fs_types]
    ext4 = {
        features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink
    }
    small = {
        inode_ratio = 4096
    }
"""
_HERE = Path(__file__).parent


def ready() -> tuple[Path, Path]:
    """(kernel, root archive), built when they are missing or older than this code. Raises LabUnavailableError."""
    kernels = list((LAB / "unpacked").glob("linux-image-*"))
    missing = [name for name in packages.PACKAGES if not (LAB / "unpacked" / name).is_dir()]
    if not kernels or missing:
        raise LabUnavailableError("its packages are not downloaded: scripts/setup --debian, with a network")
    image, root = LAB / "vmlinuz", LAB / "guest.cpio"
    newest = max(path.stat().st_mtime for path in (*_HERE.glob("*.py"), _HERE / "init"))
    if not root.exists() or root.stat().st_mtime < newest:
        _replace(image, next(kernels[0].glob("boot/vmlinuz-*")).read_bytes())
        _replace(root, build(kernels[0]))
    return image, root


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.rename(path)


def build(kernel: Path) -> bytes:
    archive = Archive()
    for name in ("proc", "sys", "dev", "tmp", "mnt", "run/lock/iscsi", "var", "root", "etc/iscsi", "var/lib/iscsi"):
        archive.directory(name)
    archive.file("bin/busybox", _busybox().read_bytes(), executable=True)
    archive.link("bin/sh", "busybox")
    archive.file("init", (_HERE / "init").read_bytes(), executable=True)
    order = []
    for name, content in module_closure(kernel, MODULES):
        archive.file(f"modules/{name}.ko", content)
        order.append(name)
    archive.file("modules/order", "".join(f"{name}\n" for name in order).encode())
    for name, path in _programs():
        archive.file(name, path.read_bytes(), executable=True)
    for alias in ("mkfs.ext4", "mkfs.ext2"):
        archive.link(f"sbin/{alias}", "mke2fs")
    for name, text in _settings().items():
        archive.file(f"etc/{name}", text.encode())
    return archive.finish()


def module_closure(kernel: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of modules and what they depend on, in the order of loading; built-in ones are left out.

    A module names its dependencies itself: `depends=` in its section .modinfo.
    """
    files = {path.name.split(".")[0].replace("-", "_"): path for path in kernel.rglob("*.ko*")}
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name not in files:
            return
        done.add(name)
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        match = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in match[1].decode().split(",") if match else ():
            yield from visit(other.replace("-", "_"))
        yield name, content

    for each in wanted:
        yield from visit(each.replace("-", "_"))


def _busybox() -> Path:
    return _found("busybox-static", "busybox")


def _found(package: str, program: str) -> Path:
    for path in (LAB / "unpacked" / package).rglob(program):
        if path.is_file() and path.parent.name in ("bin", "sbin"):
            return path
    raise LabUnavailableError(f"{package} has no program {program}")


def _programs() -> Iterator[tuple[str, Path]]:
    """Where in the guest, and where here: programs, and each library that the dynamic linker names for them."""
    places = sorted({str(path.parent) for path in (LAB / "unpacked").rglob("*.so.*")})
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(places), "LC_ALL": "C"}
    for package, program in PROGRAMS:
        path = _found(package, program)
        yield f"sbin/{program}", path
        listed = subprocess.run(["ldd", str(path)], capture_output=True, text=True, env=environment, check=False).stdout
        for line in listed.splitlines():
            if "not found" in line:
                raise LabUnavailableError(f"{program} lacks {line.split()[0]}")
            for library in re.findall(r"(/\S+)", line.partition("=>")[2] or line)[:1]:
                folder = "lib64" if "/ld-linux" in library else "usr/lib"
                yield f"{folder}/{Path(library).name}", Path(library)


def _settings() -> dict[str, str]:
    """Files of /etc. iscsid: started by hand, quick to notice a dead path, never patient with a wrong login."""
    daemon = {
        "iscsid.startup": "/sbin/iscsid",
        "node.startup": "manual",
        "node.session.initial_login_retry_max": "1",
        "node.session.timeo.replacement_timeout": "10",
        "node.conn[0].timeo.login_timeout": "15",
        "node.conn[0].timeo.logout_timeout": "15",
        "node.conn[0].timeo.noop_out_interval": "5",
        "node.conn[0].timeo.noop_out_timeout": "5",
    }
    return {
        "iscsi/iscsid.conf": "".join(f"{key} = {value}\n" for key, value in daemon.items()),
        "iscsi/initiatorname.iscsi": f"InitiatorName={INITIATOR}\n",
        "passwd": "root:x:0:0:root:/root:/bin/sh\n",
        "hosts": "127.0.0.1 localhost\n",
        "ld.so.conf": "/usr/lib\n",
        "mke2fs.conf": _MKE2FS,
    }
