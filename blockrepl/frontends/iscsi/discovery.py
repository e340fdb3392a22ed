"""Text requests of the full feature phase: SendTargets, and the one key that may change there.

Source: RFC 7143, 6.4 and 11.10 (text exchanges), Appendix C (SendTargets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blockrepl.errors import ProtocolError
from blockrepl.formats.iscsi import NO_TAG, TextFlag
from blockrepl.frontends.iscsi import text
from blockrepl.frontends.iscsi.negotiate import KEYS, OBSOLETE, Parameters, negotiate
from blockrepl.frontends.iscsi.text import NOT_UNDERSTOOD, REJECT, Pairs

Portals = Callable[[], Sequence[tuple[str, int]]]  # address as in TargetAddress, portal group tag


class TextExchange:
    """The text negotiation of one session: at most one at a time, in any number of requests and answers."""

    def __init__(self, target_name: str, portals: Portals, parameters: Parameters, *, discovery: bool) -> None:
        self._target_name = target_name
        self._portals = portals
        self._parameters = parameters
        self._discovery = discovery
        self._target_tag = NO_TAG  # of the exchange that goes on
        self._next_tag = 0
        self._given = b""
        self._rest = b""

    def receive(self, flags: int, target_tag: int, data: bytes) -> tuple[int, int, bytes]:
        """Take a request: flags, target tag and data of the response. Raises ProtocolError: reject it."""
        if target_tag == NO_TAG:
            self._given = self._rest = b""
        elif target_tag != self._target_tag:
            raise ProtocolError("a text request with a target tag of nobody")
        if self._rest:
            if data:
                raise ProtocolError("new text before the rest of an answer was fetched")
            return self._answer(flags)
        self._given += data
        if len(self._given) > text.MAX_TEXT_BYTES:
            self._end()
            raise ProtocolError("too much text")
        if flags & TextFlag.CONTINUE:
            if flags & TextFlag.FINAL:
                raise ProtocolError("a text request that is final and goes on")
            return 0, self._go_on(), b""
        given, self._given = self._given, b""
        self._rest = text.encode(self._answers(text.decode(given)))
        return self._answer(flags)

    def _answer(self, flags: int) -> tuple[int, int, bytes]:
        limit = self._parameters.max_send_bytes
        part, self._rest = self._rest[:limit], self._rest[limit:]
        if self._rest:
            return TextFlag.CONTINUE, self._go_on(), part
        if not flags & TextFlag.FINAL:
            return 0, self._go_on(), part
        self._end()
        return TextFlag.FINAL, NO_TAG, part

    def _go_on(self) -> int:
        if self._target_tag == NO_TAG:
            self._next_tag = (self._next_tag + 1) % NO_TAG
            self._target_tag = self._next_tag
        return self._target_tag

    def _end(self) -> None:
        self._target_tag = NO_TAG
        self._given = self._rest = b""

    def _answers(self, pairs: Pairs) -> Pairs:
        answers: Pairs = []
        for key, value in pairs:
            if key == "SendTargets":
                answers += self._send_targets(value)
            elif key == "MaxRecvDataSegmentLength":
                negotiate(key, value, self._parameters, discovery=self._discovery)
            elif key in KEYS or key in OBSOLETE:
                answers.append((key, REJECT))
            else:
                answers.append((key, NOT_UNDERSTOOD))
        return answers

    def _send_targets(self, value: str) -> Pairs:
        """All of them is the one there is; a session asks for its own with an empty value."""
        if value not in ("All", self._target_name) and (value or self._discovery):
            return [("SendTargets", REJECT)]
        addresses = [("TargetAddress", f"{address},{tag}") for address, tag in self._portals()]
        return [("TargetName", self._target_name), *addresses]
