"""Which function performs which command. The keys are those of `commands.COMMANDS`."""

from __future__ import annotations

from blockrepl.formats.scsi import Opcode, ServiceAction
from blockrepl.formats.scsi_reservation import InAction, OutAction
from blockrepl.frontends.iscsi.scsi import control, copy, inquire, modify, persistent, sanitize, transfer
from blockrepl.frontends.iscsi.scsi.unit import Handler

_OP, _SA = Opcode, ServiceAction

HANDLERS: dict[tuple[int, int | None], Handler] = {
    (_OP.TEST_UNIT_READY, None): control.test_unit_ready,
    (_OP.REQUEST_SENSE, None): control.request_sense,
    (_OP.INQUIRY, None): inquire.inquiry,
    (_OP.MODE_SELECT_6, None): control.mode_select,
    (_OP.MODE_SELECT_10, None): control.mode_select,
    (_OP.MODE_SENSE_6, None): control.mode_sense,
    (_OP.MODE_SENSE_10, None): control.mode_sense,
    (_OP.RESERVE_6, None): control.reserve_6,
    (_OP.RELEASE_6, None): control.release_6,
    (_OP.START_STOP_UNIT, None): control.start_stop_unit,
    (_OP.PREVENT_ALLOW_MEDIUM_REMOVAL, None): control.prevent_allow_medium_removal,
    (_OP.READ_CAPACITY_10, None): control.read_capacity_10,
    (_OP.SERVICE_ACTION_IN_16, _SA.READ_CAPACITY_16): control.read_capacity_16,
    (_OP.READ_DEFECT_DATA_10, None): control.read_defect_data_10,
    (_OP.READ_DEFECT_DATA_12, None): control.read_defect_data_12,
    (_OP.REPORT_LUNS, None): control.report_luns,
    (_OP.MAINTENANCE_IN, _SA.REPORT_TARGET_PORT_GROUPS): control.report_target_port_groups,
    (_OP.MAINTENANCE_IN, _SA.REPORT_SUPPORTED_OPERATION_CODES): control.report_supported_operation_codes,
    (_OP.MAINTENANCE_IN, _SA.REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS): control.report_supported_functions,
    (_OP.READ_6, None): transfer.read,
    (_OP.READ_10, None): transfer.read,
    (_OP.READ_12, None): transfer.read,
    (_OP.READ_16, None): transfer.read,
    (_OP.WRITE_6, None): modify.write,
    (_OP.WRITE_10, None): modify.write,
    (_OP.WRITE_12, None): modify.write,
    (_OP.WRITE_16, None): modify.write,
    (_OP.WRITE_ATOMIC_16, None): transfer.write_atomic,
    (_OP.WRITE_AND_VERIFY_10, None): transfer.write_and_verify,
    (_OP.WRITE_AND_VERIFY_12, None): transfer.write_and_verify,
    (_OP.WRITE_AND_VERIFY_16, None): transfer.write_and_verify,
    (_OP.VERIFY_10, None): transfer.verify,
    (_OP.VERIFY_12, None): transfer.verify,
    (_OP.VERIFY_16, None): transfer.verify,
    (_OP.PRE_FETCH_10, None): transfer.pre_fetch,
    (_OP.PRE_FETCH_16, None): transfer.pre_fetch,
    (_OP.SYNCHRONIZE_CACHE_10, None): transfer.synchronize_cache,
    (_OP.SYNCHRONIZE_CACHE_16, None): transfer.synchronize_cache,
    (_OP.WRITE_SAME_10, None): modify.write_same,
    (_OP.WRITE_SAME_16, None): modify.write_same,
    (_OP.UNMAP, None): modify.unmap,
    (_OP.COMPARE_AND_WRITE, None): modify.compare_and_write,
    (_OP.ORWRITE_16, None): modify.orwrite,
    (_OP.SERVICE_ACTION_IN_16, _SA.GET_LBA_STATUS): modify.get_lba_status,
    (_OP.SANITIZE, _SA.SANITIZE_OVERWRITE): sanitize.sanitize,
    (_OP.SANITIZE, _SA.SANITIZE_BLOCK_ERASE): sanitize.sanitize,
    (_OP.SANITIZE, _SA.SANITIZE_EXIT_FAILURE_MODE): sanitize.sanitize,
    (_OP.EXTENDED_COPY, _SA.EXTENDED_COPY_LID1): copy.extended_copy,
    (_OP.RECEIVE_COPY_RESULTS, _SA.COPY_STATUS_LID1): copy.copy_status,
    (_OP.RECEIVE_COPY_RESULTS, _SA.OPERATING_PARAMETERS): copy.operating_parameters,
    **{(_OP.PERSISTENT_RESERVE_IN, action): persistent.reserve_in for action in InAction},
    **{(_OP.PERSISTENT_RESERVE_OUT, action): persistent.reserve_out for action in OutAction},
}
