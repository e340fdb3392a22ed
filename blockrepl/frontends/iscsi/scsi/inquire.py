"""INQUIRY and the vital product data pages (SPC-4, 6.6 and 7.8; SBC-3, 6.6)."""

from __future__ import annotations

from collections.abc import Callable

from blockrepl.formats import scsi_copy
from blockrepl.formats import scsi_inquiry as layout
from blockrepl.formats.scsi import Opcode
from blockrepl.formats.scsi_inquiry import Association, CodeSet, DesignatorType, Page
from blockrepl.frontends.iscsi.scsi import limits
from blockrepl.frontends.iscsi.scsi.commands import COMMANDS
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.refusal import bad_cdb
from blockrepl.frontends.iscsi.scsi.unit import Answer, LogicalUnit
from blockrepl.frontends.iscsi.task import Nexus, Task

_PROTOCOL = layout.ISCSI_PROTOCOL
_THIRD_PARTY = (Opcode.EXTENDED_COPY, Opcode.RECEIVE_COPY_RESULTS)


def inquiry(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """INQUIRY."""
    cdb = task.cdb
    room = int.from_bytes(cdb[3:5], "big")
    if not cdb[1] & 0x01:  # EVPD
        if cdb[2]:
            raise bad_cdb(2)
        return standard_data(unit.identity.product)[:room]
    if cdb[2] not in _PAGES:
        raise bad_cdb(2)
    return vpd_page(unit, state.nexus, cdb[2])[:room]


def standard_data(product: bytes, peripheral: int = layout.DIRECT_ACCESS) -> bytes:
    """Standard INQUIRY data; for a LUN that is nothing, with ``peripheral`` NO_DEVICE."""
    versions = layout.VERSION_DESCRIPTORS
    data: bytes = layout.standard.build(
        {
            "peripheral": peripheral,
            "access": layout.TPGS_IMPLICIT | layout.THIRD_PARTY,
            "multi_port": layout.MULTI_PORT,
            "product": product,
            "version_descriptors": versions + (0,) * (8 - len(versions)),
        }
    )
    return data


def vpd_page(unit: LogicalUnit, nexus: Nexus, page: int) -> bytes:
    """One page, whole."""
    body = _PAGES[page](unit, nexus)
    head: bytes = layout.page_head.build({"peripheral": layout.DIRECT_ACCESS, "page": page, "length": len(body)})
    return head + body


def _supported(unit: LogicalUnit, nexus: Nexus) -> bytes:
    return bytes(sorted(_PAGES))


def _serial(unit: LogicalUnit, nexus: Nexus) -> bytes:
    return unit.identity.serial


def _designator(association: int, kind: int, code_set: int, value: bytes) -> bytes:
    of_port = association != Association.LOGICAL_UNIT
    head: bytes = layout.designator_head.build(
        {
            "code_set": (_PROTOCOL if of_port else 0) | code_set,
            "kind": (layout.PIV if of_port else 0) | association << 4 | kind,
            "length": len(value),
        }
    )
    return head + value


def _padded_name(name: str) -> bytes:
    """A SCSI name string: UTF-8, ended and padded with zeroes (SPC-4, 7.8.6.11)."""
    value = name.encode() + b"\0"
    return value + bytes(-len(value) % 4)


def _identification(unit: LogicalUnit, nexus: Nexus) -> bytes:
    identity = unit.identity
    port = bytes(2) + nexus.portal_group.to_bytes(2, "big")
    name = nexus.target_name
    return b"".join(
        [
            _designator(Association.LOGICAL_UNIT, DesignatorType.NAA, CodeSet.BINARY, identity.naa),
            _designator(
                Association.LOGICAL_UNIT, DesignatorType.T10_VENDOR, CodeSet.ASCII, layout.VENDOR + identity.serial
            ),
            _designator(Association.PORT, DesignatorType.RELATIVE_PORT, CodeSet.BINARY, port),
            _designator(Association.PORT, DesignatorType.PORT_GROUP, CodeSet.BINARY, port),
            _designator(
                Association.PORT, DesignatorType.SCSI_NAME, CodeSet.UTF_8,
                _padded_name(f"{name},t,0x{nexus.portal_group:04x}"),
            ),
            _designator(Association.TARGET_DEVICE, DesignatorType.SCSI_NAME, CodeSet.UTF_8, _padded_name(name)),
        ]
    )  # fmt: skip


def _extended(unit: LogicalUnit, nexus: Nexus) -> bytes:
    data: bytes = layout.extended_inquiry.build(
        {
            "checks": 0,
            "queueing": layout.TASK_ATTRIBUTES,
            "cache": layout.VOLATILE_CACHE,
        }
    )
    return data


def _mode_policy(unit: LogicalUnit, nexus: Nexus) -> bytes:
    return layout.MODE_POLICY_SHARED


def _limits(unit: LogicalUnit, nexus: Nexus) -> bytes:
    block = unit.block_bytes
    page = max(1, limits.PAGE_BYTES // block)
    atomic = unit.volume.atomic_bytes // block if unit.volume is not None else 0
    data: bytes = layout.block_limits.build(
        {
            "write_same_needs_length": 1,
            "compare_and_write": limits.MAX_COMPARE_BLOCKS,
            "transfer_granularity": page,
            "max_transfer": limits.MAX_TRANSFER_BYTES // block,
            "optimal_transfer": limits.OPTIMAL_TRANSFER_BYTES // block,
            "max_prefetch": limits.MAX_PREFETCH_BYTES // block,
            "max_unmap": limits.MAX_UNMAP_BLOCKS,
            "max_unmap_descriptors": limits.MAX_UNMAP_DESCRIPTORS,
            # A single block goes without saying. QEMU 7.2 takes 4 KiB for a cluster to be looked up by GET LBA STATUS,
            # and then fails its own assertion where that is the block size (block/iscsi.c, iscsi_co_block_status).
            "unmap_granularity": page if page > 1 else 0,
            "unmap_alignment": layout.UGAVALID if page > 1 else 0,
            "max_write_same": limits.MAX_WRITE_SAME_BYTES // block,
            "max_atomic": atomic,
            "atomic_alignment": 0,
            "atomic_granularity": 0,
            "max_atomic_with_boundary": 0,
            "max_atomic_boundary": 0,
        }
    )
    return data


def _characteristics(unit: LogicalUnit, nexus: Nexus) -> bytes:
    data: bytes = layout.block_characteristics.build({"after_erase": layout.READ_AFTER_BLOCK_ERASE_WORKS, "flags": 0})
    return data


def _provisioning(unit: LogicalUnit, nexus: Nexus) -> bytes:
    flags = layout.LBPU | layout.LBPWS | layout.LBPWS10 | layout.LBPRZ
    data: bytes = layout.provisioning.build({"threshold_exponent": 0, "flags": flags, "type": layout.THIN})
    return data


def _third_party(unit: LogicalUnit, nexus: Nexus) -> bytes:
    """SPC-4, 7.8.17: the mandatory descriptors, and that of general copy operations."""
    commands = b""
    for opcode in _THIRD_PARTY:
        actions = bytes(c.service_action or 0 for c in COMMANDS if c.opcode == opcode)
        commands += bytes([opcode, len(actions)]) + actions
    types = bytes([*scsi_copy.SegmentType, scsi_copy.IDENTIFICATION_TARGET])
    return b"".join(
        [
            _third_party_descriptor(layout.THIRD_PARTY_COMMANDS, bytes([len(commands)]) + commands),
            _third_party_descriptor(
                layout.THIRD_PARTY_PARAMETERS,
                layout.third_party_parameters.build(
                    {
                        "max_targets": scsi_copy.MAX_TARGETS,
                        "max_segments": scsi_copy.MAX_SEGMENTS,
                        "max_list_bytes": scsi_copy.MAX_LIST_BYTES,
                        "max_inline_bytes": 0,
                    }
                ),
            ),
            _third_party_descriptor(layout.THIRD_PARTY_DESCRIPTORS, bytes([len(types)]) + types),
            _third_party_descriptor(
                layout.THIRD_PARTY_GENERAL_COPY,
                layout.third_party_general.build(
                    {
                        "total_concurrent": 1,
                        "max_identified_concurrent": 1,
                        "max_segment_bytes": scsi_copy.MAX_SEGMENT_BYTES,
                        "granularity": scsi_copy.GRANULARITY_LOG2,
                        "inline_granularity": 0,
                    }
                ),
            ),
        ]
    )


def _third_party_descriptor(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    head: bytes = layout.third_party_descriptor.build({"type": kind, "length": len(body)})
    return head + body


_PAGES: dict[int, Callable[[LogicalUnit, Nexus], bytes]] = {
    Page.SUPPORTED: _supported,
    Page.SERIAL_NUMBER: _serial,
    Page.IDENTIFICATION: _identification,
    Page.EXTENDED_INQUIRY: _extended,
    Page.MODE_POLICY: _mode_policy,
    Page.THIRD_PARTY_COPY: _third_party,
    Page.BLOCK_LIMITS: _limits,
    Page.BLOCK_CHARACTERISTICS: _characteristics,
    Page.PROVISIONING: _provisioning,
}
