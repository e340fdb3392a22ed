"""Transmission: from bytes to commands, without I/O.

Everything a client asks is checked here, once: range, alignment, length, flags, writability. What comes out is either
right or already answered with an error. Source: NBD doc/proto.md, "Request message", "Request types", "Error values".
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from blockrepl.block import Op, Volume, WriteBatch, WriteFlag
from blockrepl.chunks import Chunk
from blockrepl.errors import BlockError
from blockrepl.formats import nbd
from blockrepl.formats.nbd import MAX_PAYLOAD_BYTES, REQUEST_BYTES, Command, CommandFlag, NbdError

_WRITE = nbd.request_head(Command.WRITE)
_READ = nbd.request_head(Command.READ)
_MAGIC_SHIFT = 32
_PLAIN = int(Op.WRITE)
_OPS: dict[int, int] = {Command.WRITE: int(Op.WRITE), Command.TRIM: int(Op.TRIM), Command.WRITE_ZEROES: int(Op.ZERO)}
_ALLOWED_FLAGS: dict[int, int] = {  # FUA is valid on all commands ("Command flags")
    Command.READ: CommandFlag.FUA,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE,
}
_BEYOND_END: dict[int, int] = {  # "Error values": what a request beyond the end is answered with
    Command.READ: NbdError.EINVAL,
    Command.WRITE: NbdError.ENOSPC,
    Command.TRIM: NbdError.EINVAL,
    Command.WRITE_ZEROES: NbdError.ENOSPC,
}
_ERRORS: dict[int, int] = {
    errno.EPERM: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.EIO: NbdError.EIO,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}

BatchDone = Callable[[WriteBatch], None]


def nbd_error(error: BlockError) -> int:
    """The number on the wire; EIO for what the protocol has no word for."""
    return _ERRORS.get(error.errno_code, NbdError.EIO)


def error_reply(cookie: int, error: int) -> bytes:
    """A simple reply that says no."""
    return nbd.REPLY.pack(nbd.REPLY_OK | error, cookie)


def batch_replies(batch: WriteBatch) -> bytes:
    """The replies to a completed batch."""
    errors = batch.errors
    if errors is None:
        return nbd.pack_replies(batch.cookies)
    pack, ok = nbd.REPLY.pack, nbd.REPLY_OK
    return b"".join(
        pack(ok if error is None else ok | nbd_error(error), cookie)
        for cookie, error in zip(batch.cookies, errors, strict=True)
    )


class Transmission:
    """Decodes the requests of one session.

    After `decode`: ``batch`` holds the writes (None when there were none), ``reads`` (cookie, offset, length) and
    ``flushes`` cookies were appended to, ``refused`` holds replies to send at once, ``ended`` that nothing more is to
    be read (DISC, or a violation, then ``violation`` says which). The owner empties them.
    """

    def __init__(self, volume: Volume, done: BatchDone) -> None:
        self.batch: WriteBatch | None = None
        self.reads: list[tuple[int, int, int]] = []
        self.flushes: list[int] = []
        self.refused: list[bytes] = []
        self.ended = False
        self.violation = ""
        self._done = done
        self._size_bytes = volume.size_bytes
        self._mask = volume.block_size_bytes - 1
        self._writable = volume.writable
        self._max_payload_bytes = min(MAX_PAYLOAD_BYTES, volume.max_write_bytes)

    def decode(self, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        """Take every complete request in ``chunk.view[start:end]``: (bytes consumed, whole size of the one cut off).

        The hot loop: long on purpose, a 4 KiB write costs 0.6 µs here and would cost twice that over method calls.
        """
        view, buffer = chunk.view, chunk.buffer
        unpack = nbd.REQUEST.unpack_from
        size_bytes, mask, most = self._size_bytes, self._mask, self._max_payload_bytes
        reads = self.reads
        batch = WriteBatch(self._done, chunk)
        offsets, lengths, cookies, payloads = batch.offsets, batch.lengths, batch.cookies, batch.payloads
        writable = self._writable
        total = 0  # payload bytes
        at = start
        need = 0
        while end - at >= REQUEST_BYTES:
            head, cookie, offset, length = unpack(buffer, at)
            if (offset | length) & mask or offset + length > size_bytes or not 0 < length <= most:
                pass
            elif head == _READ:
                reads.append((cookie, offset, length))
                at += REQUEST_BYTES
                continue
            elif head == _WRITE and writable:
                after = at + REQUEST_BYTES + length
                if after > end:
                    need = after - at
                    break
                offsets.append(offset)
                lengths.append(length)
                cookies.append(cookie)
                payloads.append(view[at + REQUEST_BYTES : after])
                total += length
                at = after
                continue
            size = self._unusual(batch, view[at:end], head, cookie, offset, length)
            if size > end - at:
                need = size
                break
            at += size
            if self.ended:
                break
        if offsets:
            _pad(batch)
            batch.size_bytes += total
            chunk.hold()
            self.batch = batch
        return at - start, need

    def _unusual(self, batch: WriteBatch, view: memoryview, head: int, cookie: int, offset: int, length: int) -> int:
        """Any request but a plain read or write that is right. Returns its whole size; one that is not whole in
        ``view`` has no effect yet."""
        if head >> _MAGIC_SHIFT != nbd.REQUEST_MAGIC:
            return self._violate("bad magic in a request")
        command, flags = head & 0xFFFF, head >> 16 & 0xFFFF
        if command == Command.DISC:
            self.ended = True
            return REQUEST_BYTES
        size = REQUEST_BYTES
        if command == Command.WRITE:
            if length > MAX_PAYLOAD_BYTES:
                return self._violate(f"a write of {length} bytes")
            size += length
            if size > len(view):
                return size
        error = self._error(command, flags, offset, length)
        if error:
            self.refused.append(error_reply(cookie, error))
        elif command == Command.READ:
            self.reads.append((cookie, offset, length))
        elif command == Command.FLUSH:
            self.flushes.append(cookie)
        else:
            self._append(batch, command, flags, cookie, offset, length, view[REQUEST_BYTES:size])
        return size

    def _error(self, command: int, flags: int, offset: int, length: int) -> int:
        """What is wrong with a request, as an NbdError; 0 when nothing is."""
        allowed = _ALLOWED_FLAGS.get(command)
        if allowed is None or flags & ~allowed:
            return NbdError.EINVAL
        if command == Command.FLUSH:
            return NbdError.EINVAL if offset or length else NbdError.NONE
        if command != Command.READ and not self._writable:
            return NbdError.EPERM
        if length == 0 or (offset | length) & self._mask:
            return NbdError.EINVAL
        if offset + length > self._size_bytes:
            return _BEYOND_END[command]
        if command in (Command.READ, Command.WRITE) and length > self._max_payload_bytes:
            return NbdError.EINVAL
        return NbdError.NONE

    def _append(
        self, batch: WriteBatch, command: int, flags: int, cookie: int, offset: int, length: int, payload: memoryview
    ) -> None:
        _pad(batch)
        batch.ops.append(_OPS[command])
        batch.flags.append(
            (flags & CommandFlag.FUA and WriteFlag.FUA) | (flags & CommandFlag.NO_HOLE and WriteFlag.NO_HOLE)
        )
        batch.offsets.append(offset)
        batch.lengths.append(length)
        batch.cookies.append(cookie)
        batch.payloads.append(payload if command == Command.WRITE else None)
        if command == Command.WRITE:
            batch.size_bytes += length
        if flags & CommandFlag.FUA:
            batch.fua = True

    def _violate(self, violation: str) -> int:
        self.violation = violation
        self.ended = True
        return REQUEST_BYTES


def _pad(batch: WriteBatch) -> None:
    """The columns that plain writes have in common are filled late, all at once."""
    missing = len(batch.offsets) - len(batch.ops)
    if missing:
        batch.ops += [_PLAIN] * missing
        batch.flags += [0] * missing
