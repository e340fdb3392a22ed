"""Everything in a full feature phase that moves no data: task management, text, NOP, logout, async messages.

Source: RFC 7143, 11.5, 11.6, 11.9 to 11.11, 11.14, 11.15, 11.18, 11.19.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockrepl.block import Buffer
from blockrepl.errors import ProtocolError
from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import (
    LUNS,
    NO_LUN,
    NO_TAG,
    SENSE_LENGTH,
    AsyncEvent,
    LogoutReason,
    LogoutResponse,
    Opcode,
    RejectReason,
)
from blockrepl.frontends.iscsi.answers import Answers
from blockrepl.frontends.iscsi.discovery import TextExchange
from blockrepl.frontends.iscsi.task import Task, TaskFunction, TaskResponse

if TYPE_CHECKING:
    from blockrepl.frontends.iscsi.session import Session

TASK_REASSIGN = 8
LOGOUT_WITHIN_S = 1


class Management:
    """Answers for one session."""

    def __init__(
        self, session: Session, answers: Answers, text: TextExchange, reset_all: Callable[[], None]
    ) -> None:  # fmt: skip
        self._session = session
        self._answers = answers
        self._text = text
        self._reset_all = reset_all
        self._ping_tag = 0

    def receive(self, kind: int, header: bytes, data: memoryview) -> None:
        """A request in its turn."""
        if kind == Opcode.NOP_OUT:
            self._nop(header, data)
        elif kind == Opcode.TASK_REQUEST:
            self._manage(header)
        elif kind == Opcode.TEXT_REQUEST:
            self._exchange(header, bytes(data))
        elif kind == Opcode.LOGOUT_REQUEST:
            self._logout(header)
        elif kind == Opcode.SNACK_REQUEST:
            self._session.reject(RejectReason.SNACK, header)
        else:  # a login in mid-session
            self._session.reject(RejectReason.PROTOCOL_ERROR, header)

    # ping

    def _nop(self, header: bytes, data: memoryview) -> None:
        """Echo a ping; an answer to ours (tag reserved) has done its work by coming."""
        fields = iscsi.nop_out.parse(header)
        if fields["tag"] == NO_TAG:
            return
        if fields["target_tag"] != NO_TAG:
            self._session.reject(RejectReason.INVALID_FIELD, header)
            return
        limit = self._session.request.parameters.max_send_bytes
        self._session.send(
            self._answers.numbered(
                iscsi.nop_in, bytes(data[:limit]), lun=fields["lun"], tag=fields["tag"], target_tag=NO_TAG
            )
        )

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._ping_tag = (self._ping_tag + 1) % NO_TAG
        self._session.send(
            self._answers.numbered(iscsi.nop_in, advance=False, lun=0, tag=NO_TAG, target_tag=self._ping_tag)
        )

    # task management

    def _manage(self, header: bytes) -> None:
        fields = iscsi.task_request.parse(header)
        function, tag, session = fields["function"] & 0x7F, fields["tag"], self._session
        nexus = session.nexus
        assert nexus is not None
        lun = LUNS.get(fields["lun"], NO_LUN)
        if function == TASK_REASSIGN:
            self._managed(tag, function, TaskResponse.NO_REASSIGN)
            return
        if function not in TaskFunction.__members__.values():
            self._managed(tag, function, TaskResponse.NOT_SUPPORTED)
            return
        session.execute_before()
        referenced: int | None = None
        if function == TaskFunction.ABORT_TASK:
            referenced = fields["referenced_tag"]
            if session.drop(lambda task: task.tag == referenced):
                self._managed(tag, function, TaskResponse.COMPLETE)
                return
            if referenced is not None and not session.is_active(referenced):
                self._managed(tag, function, self._never_came(fields["cmd_sn"], fields["ref_cmd_sn"]))
                return
        else:
            session.drop(_scope(function, lun))
        session.device.abort(
            nexus, function, lun, referenced, lambda response: self._managed(tag, function, response)
        )  # fmt: skip

    def _never_came(self, cmd_sn: int, ref_cmd_sn: int) -> TaskResponse:
        """A task that is not here: on its way, then it is considered received; or done with."""
        if cmd_sn - ref_cmd_sn & 0xFFFFFFFF in range(1, 1 << 31) and self._session.skip(ref_cmd_sn):
            return TaskResponse.COMPLETE
        return TaskResponse.NO_TASK

    def _managed(self, tag: int, function: int, response: TaskResponse) -> None:
        self._session.send(self._answers.numbered(iscsi.task_response, response=response, tag=tag))
        if function == TaskFunction.TARGET_COLD_RESET and response == TaskResponse.COMPLETE:
            self._reset_all()

    # text and logout

    def _exchange(self, header: bytes, data: bytes) -> None:
        fields = iscsi.text_request.parse(header)
        if fields["tag"] == NO_TAG:
            self._session.reject(RejectReason.INVALID_FIELD, header)
            return
        try:
            flags, target_tag, answer = self._text.receive(fields["flags"], fields["target_tag"], data)
        except ProtocolError:
            self._session.reject(RejectReason.PROTOCOL_ERROR, header)
            return
        self._session.send(
            self._answers.numbered(iscsi.text_response, answer, flags=flags, tag=fields["tag"], target_tag=target_tag)
        )

    def _logout(self, header: bytes) -> None:
        fields = iscsi.logout_request.parse(header)
        reason, session = fields["reason"] & 0x7F, self._session
        parameters = session.request.parameters
        if reason == LogoutReason.RECOVERY:
            response = LogoutResponse.NO_RECOVERY
        elif reason == LogoutReason.CLOSE_CONNECTION and fields["cid"] != session.request.cid:
            response = LogoutResponse.NO_CONNECTION
        elif reason in (LogoutReason.CLOSE_SESSION, LogoutReason.CLOSE_CONNECTION):
            response = LogoutResponse.SUCCESS
        else:
            session.reject(RejectReason.INVALID_FIELD, header)
            return
        session.execute_before()
        session.send(
            self._answers.numbered(
                iscsi.logout_response, response=response, tag=fields["tag"], time2wait_s=parameters.time2wait_s,
                time2retain_s=parameters.time2retain_s,
            )
        )  # fmt: skip
        if response is LogoutResponse.SUCCESS:
            session.leave()

    # unasked

    def tell(self, event: AsyncEvent, lun: int = 0, sense: bytes = b"") -> None:
        """An async message."""
        data = SENSE_LENGTH.pack(len(sense)) + sense if sense else b""
        within = LOGOUT_WITHIN_S if event is AsyncEvent.LOGOUT_REQUESTED else 0
        buffers: list[Buffer] = self._answers.numbered(
            iscsi.async_message, data, lun=iscsi.lun_address(lun), event=event, parameter_3=within
        )
        self._session.send(buffers)


def _scope(function: int, lun: int) -> Callable[[Task], bool]:
    """Which tasks of its own nexus a function ends."""
    if function in (TaskFunction.ABORT_TASK_SET, TaskFunction.CLEAR_TASK_SET, TaskFunction.LOGICAL_UNIT_RESET):
        return lambda task: task.lun == lun
    if function in (TaskFunction.TARGET_WARM_RESET, TaskFunction.TARGET_COLD_RESET):
        return lambda task: True
    return lambda task: False
