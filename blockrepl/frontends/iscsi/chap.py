"""CHAP, one way and mutual, without I/O or chance: challenges come in (RFC 7143, 12.1.3 and 9.2.1; RFC 1994).

Algorithms by IANA's "PPP Authentication Algorithms": 5 MD5, 7 SHA-256, 8 SHA3-256. SHA-1 (6) is not offered. The
strongest that the initiator names is taken; MD5 only where the definition allows it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from blockrepl.frontends.iscsi.text import Pairs, parse_binary, parse_number

MIN_SECRET_BYTES = 12  # RFC 7143, 9.2.1: 96 bits
CHALLENGE_BYTES = 32
MD5, SHA256, SHA3_256 = 5, 7, 8
DIGESTS: dict[int, Callable[[bytes], bytes]] = {
    SHA3_256: lambda data: hashlib.sha3_256(data).digest(),
    SHA256: lambda data: hashlib.sha256(data).digest(),
    MD5: lambda data: hashlib.md5(data, usedforsecurity=False).digest(),
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who may log in, and who we are. Secrets never show in a repr."""

    users: Mapping[str, bytes] = field(repr=False)
    mutual: tuple[str, bytes] | None = field(default=None, repr=False)
    allow_md5: bool = False


class ChapError(Exception):
    """The initiator is not who it says, or does not play by the rules. The words are for our log only."""


class Chap:
    """Our side of one authentication: `algorithm`, then `response`."""

    def __init__(self, credentials: Credentials, identifier: int, challenge: bytes) -> None:
        assert len(challenge) >= CHALLENGE_BYTES
        self.user = ""
        self._credentials = credentials
        self._identifier = identifier & 0xFF
        self._challenge = challenge
        self._algorithm = 0

    def algorithm(self, offered: str) -> Pairs:
        """Answer CHAP_A=<list>. Raises ChapError when we have none of them."""
        numbers = {parse_number(item) for item in offered.split(",")}
        for number in DIGESTS:
            if number in numbers and (number != MD5 or self._credentials.allow_md5):
                self._algorithm = number
                return [
                    ("CHAP_A", str(number)),
                    ("CHAP_I", str(self._identifier)),
                    ("CHAP_C", "0x" + self._challenge.hex()),
                ]
        raise ChapError(f"no algorithm that is allowed here among {offered!r}")

    @property
    def begun(self) -> bool:
        return self._algorithm != 0

    def response(self, given: Mapping[str, str]) -> Pairs:
        """Check CHAP_N and CHAP_R; answer CHAP_I and CHAP_C if they are there. Raises ChapError."""
        if "CHAP_N" not in given or "CHAP_R" not in given:
            raise ChapError("CHAP_N or CHAP_R is missing")
        name, proof = given["CHAP_N"], parse_binary(given["CHAP_R"])
        digest = DIGESTS[self._algorithm]
        # An unknown name takes the same time as a wrong secret.
        secret = self._credentials.users.get(name, self._challenge)
        expected = digest(bytes([self._identifier]) + secret + self._challenge)
        right = hmac.compare_digest(expected, proof or b"")
        if not right or name not in self._credentials.users:
            raise ChapError(f"wrong name or secret (name {name!r})")
        self.user = name
        return self._prove(given, secret)

    def _prove(self, given: Mapping[str, str], secret: bytes) -> Pairs:
        if ("CHAP_I" in given) != ("CHAP_C" in given):
            raise ChapError("CHAP_I and CHAP_C belong together")
        if "CHAP_C" not in given:
            return []
        challenge, identifier = parse_binary(given["CHAP_C"]), parse_number(given["CHAP_I"])
        if challenge is None or identifier is None or identifier > 255:
            raise ChapError("CHAP_I or CHAP_C is malformed")
        if challenge == self._challenge:
            raise ChapError("our own challenge came back")
        if self._credentials.mutual is None:
            raise ChapError("the initiator wants to know who we are, and no mutual secret is defined")
        own_name, own_secret = self._credentials.mutual
        if own_secret == secret:
            raise ChapError("both directions have the same secret")
        answer = DIGESTS[self._algorithm](bytes([identifier]) + own_secret + challenge)
        return [("CHAP_N", own_name), ("CHAP_R", "0x" + answer.hex())]
