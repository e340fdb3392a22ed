"""Key=value text of logins and text requests (RFC 7143, 6.1), and the values in it."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable

from blockrepl.errors import ProtocolError

MAX_TEXT_BYTES = 1 << 16  # of one negotiation, over all PDUs that continue it
MAX_KEYS = 64  # so that their answers always fit one PDU
MAX_VALUE_BYTES = 255  # unless a key says otherwise (6.1)
MAX_BINARY_BYTES = 1024
LONG_VALUES = {"CHAP_C": 2100, "CHAP_R": 2100, "SendTargets": 1024}  # a binary value of 1024 bytes, in hex
REJECT, NOT_UNDERSTOOD, IRRELEVANT, NONE = "Reject", "NotUnderstood", "Irrelevant", "None"

_KEY = re.compile(r"[A-Z][A-Za-z0-9.\-+@_#:]{0,62}")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}")

Pairs = list[tuple[str, str]]


def decode(data: bytes) -> Pairs:
    """The pairs in order. Raises ProtocolError: no text, too much of it, or a key that stands there twice."""
    pairs: Pairs = []
    seen: set[str] = set()
    if len(data) > MAX_TEXT_BYTES:
        raise ProtocolError(f"{len(data)} bytes of text")
    for item in data.split(b"\0"):
        if not item:
            continue
        try:
            key, equals, value = item.decode().partition("=")
        except UnicodeDecodeError:
            raise ProtocolError("text that is not UTF-8") from None
        if not equals or _KEY.fullmatch(key) is None:
            raise ProtocolError(f"no key=value pair: {key[:63]!r}")
        if len(value.encode()) > LONG_VALUES.get(key, MAX_VALUE_BYTES):
            raise ProtocolError(f"the value of {key} is too long")
        if key in seen:
            raise ProtocolError(f"the key {key} stands there twice")
        if len(seen) == MAX_KEYS:
            raise ProtocolError("too many keys")
        seen.add(key)
        pairs.append((key, value))
    return pairs


def encode(pairs: Iterable[tuple[str, str]]) -> bytes:
    """As it goes into data segments."""
    return b"".join(f"{key}={value}\0".encode() for key, value in pairs)


def parse_number(value: str) -> int | None:
    """A numerical value, decimal or hexadecimal; None when it is none."""
    if _NUMBER.fullmatch(value) is None:
        return None
    return int(value, 16) if value[:2] in ("0x", "0X") else int(value)


def parse_binary(value: str) -> bytes | None:
    """A binary value in hex (0x…) or base64 (0b…); None when it is none, empty, or longer than 1024 bytes."""
    if len(value) > 2 * MAX_BINARY_BYTES + 2:
        return None
    prefix, digits = value[:2].lower(), value[2:]
    try:
        if prefix == "0x":
            found = bytes.fromhex(digits.rjust(len(digits) + len(digits) % 2, "0")) if digits.isalnum() else b""
        elif prefix == "0b":
            found = base64.b64decode(digits, validate=True)
        else:
            return None
    except (ValueError, binascii.Error):
        return None
    return found if 0 < len(found) <= MAX_BINARY_BYTES else None
