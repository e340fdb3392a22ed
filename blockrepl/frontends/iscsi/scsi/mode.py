"""Mode pages of a logical unit: one copy for all nexuses, not saved (SPC-4, 7.5; SBC-3, 6.5)."""

from __future__ import annotations

from collections.abc import Callable

from blockrepl.formats import scsi_mode as layout
from blockrepl.formats.scsi import Asc
from blockrepl.formats.scsi_mode import ALL_SUBPAGES, DPOFUA, PageCode
from blockrepl.frontends.iscsi.scsi.refusal import bad_cdb, bad_parameter, illegal

_CURRENT, _CHANGEABLE, _DEFAULT, _SAVED = range(4)
_SAVING_NOT_SUPPORTED = 0x3900
_SHORT_BLOCKS = 0xFFFFFFFF


class ModePages:
    """What can be changed: WCE, D_SENSE, SWP and TAS."""

    def __init__(self) -> None:
        self.write_cache = True
        self.descriptor_sense = False
        self.software_write_protect = False
        self.task_aborted_status = False

    # sense

    def sense(self, cdb: bytes, blocks: int, block_bytes: int, *, long_header: bool, write_protected: bool) -> bytes:
        """The answer to MODE SENSE(6) or (10), whole. Raises Refusal."""
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == _SAVED:
            raise illegal(_SAVING_NOT_SUPPORTED)
        descriptor = b""
        if not cdb[1] & 0x08:  # DBD
            if long_header and cdb[1] & 0x10:  # LLBAA
                descriptor = layout.long_descriptor.build({"blocks": blocks, "block_bytes": block_bytes})
            else:
                descriptor = layout.short_descriptor.build(
                    {"blocks": min(blocks, _SHORT_BLOCKS), "block_bytes": block_bytes}
                )
        pages = self._pages(page, subpage, control)
        size = len(descriptor) + len(pages)
        fields = {
            "medium": 0,
            "device_specific": DPOFUA | (layout.WRITE_PROTECT if write_protected else 0),
            "descriptor_bytes": len(descriptor),
        }
        if long_header:
            fields |= {"data_bytes": layout.HEADER_10_BYTES - 2 + size, "long_lba": len(descriptor) == 16}
            head: bytes = layout.header_10.build(fields)
        else:
            head = layout.header_6.build(fields | {"data_bytes": layout.HEADER_6_BYTES - 1 + size})
        return head + descriptor + pages

    def _pages(self, page: int, subpage: int, control: int) -> bytes:
        if subpage not in (0, ALL_SUBPAGES):
            raise bad_cdb(3)
        if page == PageCode.ALL:
            return b"".join(build(self, control) for build in _PAGES.values())
        if page not in _PAGES:
            raise bad_cdb(2, 5)
        return _PAGES[page](self, control)

    def _error_recovery(self, control: int) -> bytes:
        data: bytes = layout.error_recovery.build({"flags": 0, "retries": 0})
        return data

    def _disconnect(self, control: int) -> bytes:
        data: bytes = layout.disconnect.build({})
        return data

    def _caching(self, control: int) -> bytes:
        cached = {_CURRENT: self.write_cache, _CHANGEABLE: True, _DEFAULT: True}[control]
        data: bytes = layout.caching.build({"flags": layout.WCE if cached else 0})
        return data

    def _control(self, control: int) -> bytes:
        if control == _CHANGEABLE:
            fields = {"sense": layout.D_SENSE, "queueing": 0, "protect": layout.SWP, "aborts": layout.TAS}
            page = layout.control.build(fields | {"self_test_s": 0})
            at = 8  # the busy timeout is fixed
            return bytes(page[:at] + b"\0\0" + page[at + 2 :])
        current = control == _CURRENT
        data: bytes = layout.control.build(
            {
                "sense": layout.D_SENSE if current and self.descriptor_sense else 0,
                "queueing": layout.UNRESTRICTED_REORDERING,
                "protect": layout.SWP if current and self.software_write_protect else 0,
                "aborts": layout.TAS if current and self.task_aborted_status else 0,
                "self_test_s": 0,
            }
        )
        return data

    def _exceptions(self, control: int) -> bytes:
        data: bytes = layout.exceptions.build({"flags": 0, "report": 0})
        return data

    # select

    def select(self, cdb: bytes, data: bytes, *, long_header: bool) -> bool:
        """Take the parameter list of MODE SELECT(6) or (10), all of it or nothing. True: something changed.

        Raises Refusal.
        """
        if not cdb[1] & 0x10:  # PF
            raise bad_cdb(1, 4)
        if cdb[1] & 0x01:  # SP: there is nowhere to save pages
            raise bad_cdb(1, 0)
        if not data:
            return False
        head_bytes = layout.HEADER_10_BYTES if long_header else layout.HEADER_6_BYTES
        if len(data) < head_bytes:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        head = (layout.header_10 if long_header else layout.header_6).parse(data)
        at = head_bytes + head.descriptor_bytes
        if at > len(data):
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        changes = []
        while at < len(data):
            page = data[at : at + 2 + (data[at + 1] if at + 1 < len(data) else 0)]
            if len(page) < 2 or len(page) != 2 + page[1]:
                raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
            changes.append(self._check(page, at))
            at += len(page)
        before = self._state()
        for change in changes:
            change()
        return self._state() != before

    def _state(self) -> tuple[bool, ...]:
        return self.write_cache, self.descriptor_sense, self.software_write_protect, self.task_aborted_status

    def _check(self, page: bytes, at: int) -> Callable[[], None]:
        """What a page changes; only changeable bits may differ from what is current (SPC-4, 6.11)."""
        code = page[0] & 0x3F
        if page[0] & layout.SUBPAGE_FORMAT or code not in _PAGES:
            raise bad_parameter(at)
        current, mask = _PAGES[code](self, _CURRENT), _PAGES[code](self, _CHANGEABLE)
        if len(page) != len(current):
            raise bad_parameter(at + 1)
        for index in range(2, len(page)):
            wrong = (page[index] ^ current[index]) & ~mask[index]
            if wrong:
                raise bad_parameter(at + index, wrong.bit_length() - 1)
        take = _TAKE.get(code, ModePages._take_nothing)
        return take(self, bytes([code]) + page[1:])

    def _take_nothing(self, page: bytes) -> Callable[[], None]:
        return lambda: None

    def _take_caching(self, page: bytes) -> Callable[[], None]:
        fields = layout.caching.parse(page)

        def take() -> None:
            self.write_cache = bool(fields.flags & layout.WCE)

        return take

    def _take_control(self, page: bytes) -> Callable[[], None]:
        fields = layout.control.parse(page)

        def take() -> None:
            self.descriptor_sense = bool(fields.sense & layout.D_SENSE)
            self.software_write_protect = bool(fields.protect & layout.SWP)
            self.task_aborted_status = bool(fields.aborts & layout.TAS)

        return take


_PAGES: dict[int, Callable[[ModePages, int], bytes]] = {
    PageCode.ERROR_RECOVERY: ModePages._error_recovery,
    PageCode.DISCONNECT: ModePages._disconnect,
    PageCode.CACHING: ModePages._caching,
    PageCode.CONTROL: ModePages._control,
    PageCode.EXCEPTIONS: ModePages._exceptions,
}
_TAKE: dict[int, Callable[[ModePages, bytes], Callable[[], None]]] = {
    PageCode.CACHING: ModePages._take_caching,
    PageCode.CONTROL: ModePages._take_control,
}
