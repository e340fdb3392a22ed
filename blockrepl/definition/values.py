"""Sizes and addresses as a definition writes them."""

from __future__ import annotations

import re

SIZE_PATTERN = re.compile(r"(\d+) ?([KMGTP]i)?B?")
SIZE_UNITS = {unit: 1 << 10 * (power + 1) for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"))}


class Size(int):
    """A number of bytes. In a definition an integer, or a string such as "512MiB" or "4KiB"."""


class Address(str):
    """``HOST:PORT``; an IPv6 host stands in brackets."""

    @property
    def host(self) -> str:
        """The host without brackets."""
        return self.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """1 … 65535."""
        return int(self.rpartition(":")[2])


def parse_size(text: str | int) -> Size:
    """Bytes of 4096, "4096" or "4KiB". Raises ValueError that says what to write."""
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError('a size is an integer of bytes or a string such as "512MiB"')
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        return Size(text)
    match = SIZE_PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'"{text}" is no size: write whole numbers with KiB, MiB, GiB, TiB or bytes, such as "512MiB"')
    return Size(int(match[1]) * SIZE_UNITS.get(match[2], 1))


def parse_address(text: str) -> Address:
    """``HOST:PORT``. Raises ValueError that says what to write."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host) or re.search(r"[\s\[\]/]", bare):
        raise ValueError(f'"{text}" is no address: write "HOST:PORT", such as "127.0.0.1:7110" or "[::1]:7110"')
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f'"{text}" has no port: it is a number from 1 to 65535, such as "127.0.0.1:7110"')
    return Address(text)
