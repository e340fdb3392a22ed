"""The login phase of one connection, without I/O: from requests to an answered, authenticated, negotiated session.

Sources: RFC 7143, 6.3 (login phase), 11.12 and 11.13 (its PDUs), 12.1 (security), 13 (keys).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from blockrepl.errors import ProtocolError
from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import LoginFlag, LoginStatus, Opcode, Stage
from blockrepl.frontends.iscsi import text
from blockrepl.frontends.iscsi.chap import CHALLENGE_BYTES, Chap, ChapError, Credentials
from blockrepl.frontends.iscsi.negotiate import MAX_RECV_BYTES, Parameters, conclude, in_order, negotiate
from blockrepl.frontends.iscsi.text import NONE, Pairs

MAX_REQUESTS = 32  # of one login
CHANCE_BYTES = 1 + CHALLENGE_BYTES
INITIAL_WINDOW = 16  # commands an initiator may send after login; the session widens it with its first answer
_NAMES = ("InitiatorName", "TargetName", "SessionType")  # declared once; the same again is harmless
_INITIATOR_NAME = re.compile(r"[!-~\u00a1-\uffff]{1,223}")


@dataclass(frozen=True, slots=True)
class Access:
    """Who may log in. ``initiators`` are globs of names; None means all on loopback and nobody elsewhere.

    ``credentials`` None: no authentication is asked for.
    """

    initiators: tuple[str, ...] | None = None
    credentials: Credentials | None = None

    def allows(self, initiator_name: str, *, loopback: bool) -> bool:
        if self.initiators is None:
            return loopback
        return any(fnmatchcase(initiator_name, pattern) for pattern in self.initiators)


@dataclass(frozen=True, slots=True)
class TargetDescription:
    """The target as a login sees it."""

    name: str
    alias: str
    portal_group: int
    access: Access


class State(Enum):
    """GOING → DONE or FAILED."""

    GOING = "going"
    DONE = "done"
    FAILED = "failed"


class LoginError(Exception):
    """Ends a login with a status. The words are for our log."""

    def __init__(self, status: LoginStatus, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(slots=True)
class Request:
    """What a login came to, or is about to. ``stat_sn`` is the next, ``cmd_sn`` the first expected."""

    isid: bytes = bytes(6)
    tsih: int = 0
    cid: int = 0
    cmd_sn: int = 0
    stat_sn: int = 0
    initiator_name: str = ""
    initiator_alias: str = ""
    discovery: bool = False
    user: str = ""
    parameters: Parameters = field(default_factory=Parameters)


class Login:
    """One login. ``admit`` is called when all is agreed: it takes the session in and gives its TSIH, or raises
    LoginError. ``chance`` is `CHANCE_BYTES` nobody could guess."""

    def __init__(
        self, target: TargetDescription, admit: Callable[[Request], int], chance: bytes, *, loopback: bool
    ) -> None:
        assert len(chance) == CHANCE_BYTES
        self.state = State.GOING
        self.reason = ""  # why it failed
        self.request = Request()
        self._target = target
        self._admit = admit
        self._loopback = loopback
        credentials = target.access.credentials
        self._chap = Chap(credentials, chance[0], chance[1:]) if credentials is not None else None
        self._authenticated = credentials is None
        self._stage: int | None = None
        self._requests = 0
        self._begun = False  # the first request, whole, has been read
        self._text = b""
        self._seen: dict[str, str] = {}
        self._declared = False  # our receive limit

    def receive(self, header: bytes, data: bytes) -> bytes:
        """Take one login request; the response, a whole PDU. Behind DONE and FAILED nothing is to come."""
        assert self.state is State.GOING
        opcode = header[0]
        fields = iscsi.login_request.parse(header)
        try:
            if opcode != Opcode.LOGIN_REQUEST | iscsi.IMMEDIATE:
                raise LoginError(LoginStatus.INVALID_REQUEST, f"opcode {opcode:#x} before the end of the login")
            flags, answers = self._step(fields, data)
        except LoginError as error:
            return self._failed(fields, error.status, str(error))
        except ProtocolError as error:
            return self._failed(fields, LoginStatus.INITIATOR_ERROR, str(error))
        except ChapError as error:
            return self._failed(fields, LoginStatus.AUTHENTICATION_FAILED, str(error))
        return self._response(fields, flags, answers)

    # one request

    def _step(self, fields: dict[str, Any], data: bytes) -> tuple[int, Pairs]:
        self._check(fields)
        flags = fields["flags"]
        current, following = flags >> 2 & 3, flags & 3
        transit, continued = bool(flags & LoginFlag.TRANSIT), bool(flags & LoginFlag.CONTINUE)
        if current not in (Stage.SECURITY, Stage.OPERATIONAL) or self._stage not in (None, current):
            raise LoginError(LoginStatus.INITIATOR_ERROR, f"stage {current} is not the current one")
        if transit and (continued or following not in (Stage.OPERATIONAL, Stage.FULL_FEATURE) or following <= current):
            raise LoginError(LoginStatus.INITIATOR_ERROR, f"no way from stage {current} to {following}")
        self._stage = current
        self._text += data
        if len(self._text) > text.MAX_TEXT_BYTES:
            raise LoginError(LoginStatus.INITIATOR_ERROR, "too much text")
        if continued:
            return current << 2, []
        pairs, self._text = text.decode(self._text), b""
        answers = self._begin(dict(pairs)) if not self._begun else []
        if current == Stage.OPERATIONAL and not self._authenticated:
            raise LoginError(LoginStatus.AUTHENTICATION_FAILED, "no authentication, and it is asked for")
        answers += self._answers(current, pairs)
        if not transit or not self._authenticated:
            return current << 2, answers
        if current == Stage.SECURITY and self._chap is not None:
            self.request.user = self._chap.user
        self._stage = following
        if following == Stage.FULL_FEATURE:
            self._finish()
        return LoginFlag.TRANSIT | current << 2 | following, answers

    def _check(self, fields: dict[str, Any]) -> None:
        """What the header says, compared with the first one's."""
        request = self.request
        self._requests += 1
        if self._requests > MAX_REQUESTS:
            raise LoginError(LoginStatus.INITIATOR_ERROR, "the login leads nowhere")
        identity = (fields["isid"], fields["tsih"], fields["cid"])
        if self._requests == 1:
            request.isid, request.tsih, request.cid = bytes(fields["isid"]), fields["tsih"], fields["cid"]
            request.cmd_sn, request.stat_sn = fields["cmd_sn"], fields["exp_stat_sn"]
        elif identity != (request.isid, request.tsih, request.cid):
            raise LoginError(LoginStatus.INITIATOR_ERROR, "ISID, TSIH or CID changed during the login")
        if fields["version_min"] > 0:
            raise LoginError(LoginStatus.UNSUPPORTED_VERSION, f"version {fields['version_min']} at least")

    def _begin(self, given: dict[str, str]) -> Pairs:
        """The first request says who, whom and what for (RFC 7143, 6.3)."""
        self._begun = True
        request, target = self.request, self._target
        request.initiator_name = given.get("InitiatorName", "")
        request.initiator_alias = given.get("InitiatorAlias", "")
        if not request.initiator_name:
            raise LoginError(LoginStatus.MISSING_PARAMETER, "InitiatorName is missing")
        if _INITIATOR_NAME.fullmatch(request.initiator_name) is None or len(request.initiator_name.encode()) > 223:
            raise LoginError(LoginStatus.INITIATOR_ERROR, "InitiatorName is malformed")
        kind = given.get("SessionType", "Normal")
        if kind not in ("Normal", "Discovery"):
            raise LoginError(LoginStatus.SESSION_TYPE, f"SessionType={kind}")
        request.discovery = kind == "Discovery"
        if not request.discovery and "TargetName" not in given:
            raise LoginError(LoginStatus.MISSING_PARAMETER, "TargetName is missing")
        if "TargetName" in given and given["TargetName"].lower() != target.name:
            raise LoginError(LoginStatus.NOT_FOUND, f"there is no target {given['TargetName']}")
        if not target.access.allows(request.initiator_name, loopback=self._loopback):
            raise LoginError(LoginStatus.NOT_AUTHORIZED, f"{request.initiator_name} is not among the initiators")
        if request.discovery:
            return []
        return [("TargetPortalGroupTag", str(target.portal_group)), ("TargetAlias", target.alias)]

    def _answers(self, stage: int, pairs: Pairs) -> Pairs:
        answers: Pairs = []
        for key, value in pairs:
            if key in self._seen and not (key in _NAMES and self._seen[key] == value):
                raise LoginError(LoginStatus.INITIATOR_ERROR, f"the key {key} came a second time")
            self._seen[key] = value
        if stage == Stage.SECURITY:
            answers += self._authenticate(dict(pairs))
        for key, value in in_order(pairs):
            if key in _NAMES or key == "AuthMethod" or key.startswith("CHAP_"):
                continue
            answer = negotiate(key, value, self.request.parameters, discovery=self.request.discovery)
            if answer is not None:
                answers.append((key, answer))
        if stage == Stage.OPERATIONAL and not self._declared:
            self._declared = True
            self.request.parameters.max_recv_bytes = MAX_RECV_BYTES
            answers.append(("MaxRecvDataSegmentLength", str(MAX_RECV_BYTES)))
        return answers

    def _authenticate(self, given: dict[str, str]) -> Pairs:
        """AuthMethod, then CHAP_A, then CHAP_N and CHAP_R: one step for each request (RFC 7143, 12.1.3)."""
        chap = self._chap
        if "AuthMethod" in given:
            methods = given["AuthMethod"].split(",")
            wanted = "CHAP" if chap is not None else NONE
            if wanted not in methods:
                raise LoginError(LoginStatus.AUTHENTICATION_FAILED, f"{wanted} is not among {methods}")
            return [("AuthMethod", wanted)]
        if chap is None or self._authenticated or not any(key.startswith("CHAP_") for key in given):
            return []
        if self._seen.get("AuthMethod") is None:
            raise ChapError("CHAP before AuthMethod")
        if not chap.begun:
            return chap.algorithm(given.get("CHAP_A", ""))
        answers = chap.response(given)
        self._authenticated = True
        return answers

    def _finish(self) -> None:
        conclude(self.request.parameters)
        tsih = self._admit(self.request)
        assert 0 < tsih <= 0xFFFF
        self.request.tsih = tsih
        self.state = State.DONE

    # answers

    def _failed(self, fields: dict[str, int], status: LoginStatus, words: str) -> bytes:
        self.state = State.FAILED
        self.reason = words
        return self._response(fields, fields["flags"] & LoginFlag.CURRENT, [], status)

    def _response(
        self, fields: dict[str, int], flags: int, answers: Pairs, status: LoginStatus = LoginStatus.SUCCESS
    ) -> bytes:
        request = self.request
        data = text.encode(answers)
        assert len(data) <= 8192
        header = iscsi.login_response.build(
            {
                "flags": flags, "data_bytes": len(data), "isid": fields["isid"], "tsih": request.tsih,
                "tag": fields["tag"], "stat_sn": request.stat_sn, "exp_cmd_sn": request.cmd_sn,
                "max_cmd_sn": request.cmd_sn + INITIAL_WINDOW - 1 & 0xFFFFFFFF, "status": status,
            }
        )  # fmt: skip
        request.stat_sn = request.stat_sn + 1 & 0xFFFFFFFF
        return bytes(header) + data + bytes(-len(data) % 4)
