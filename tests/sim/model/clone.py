"""Copies of machines, closures of their roles included; and keys by which equal ones are known.

A role keeps closures ("when this is saved, then …"). Pickle cannot copy those, so they are rebuilt here from their code
and copies of their cells.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum
from types import CellType, FunctionType
from typing import Any

_functions: dict[tuple[str, int, str, bytes], FunctionType] = {}


def _shell(name: tuple[str, int, str, bytes]) -> FunctionType:
    """The function, its cells still empty."""
    known = _functions[name]
    cells = tuple(CellType() for _ in known.__closure__ or ())
    return FunctionType(known.__code__, known.__globals__, known.__name__, known.__defaults__, cells)


def _fill(function: FunctionType, contents: list[Any]) -> None:
    for cell, content in zip(function.__closure__ or (), contents, strict=True):
        cell.cell_contents = content


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, constants: dict[int, str]) -> None:
        super().__init__(file, 5)
        self._constants = constants

    def persistent_id(self, obj: Any) -> str | None:
        return self._constants.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType) and (obj.__closure__ or "<" in obj.__qualname__):
            code = obj.__code__
            name = code.co_filename, code.co_firstlineno, code.co_qualname, code.co_code
            _functions[name] = obj
            contents = [cell.cell_contents for cell in obj.__closure__ or ()]
            return _shell, (name,), contents, None, None, _fill
        if isinstance(obj, memoryview):
            return memoryview, (bytes(obj),)
        return NotImplemented


class _KeyPickler(_Pickler):
    """Data only, and no memory of what was seen: cycles must lead over ``constants``."""

    def __init__(self, file: io.BytesIO, constants: dict[int, str]) -> None:
        super().__init__(file, constants)
        self.fast = True

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, (type, Enum)):
            return f"{obj!r}"
        return self._constants.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        found = super().reducer_override(obj)
        return (list, (found[1:3],)) if isinstance(found, tuple) and found[0] is _shell else found


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, constants: dict[str, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._constants = constants

    def persistent_load(self, pid: Any) -> Any:
        return self._constants[pid]


class Copier:
    """Copies machines. ``constants``: what all of them share, by name; never copied."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self._constants = constants
        self._names = {id(value): name for name, value in constants.items()}

    def dump(self, machine: Any) -> bytes:
        """What `load` makes a copy of."""
        file = io.BytesIO()
        _Pickler(file, self._names).dump(machine)
        return file.getvalue()

    def load(self, data: bytes) -> Any:
        """A machine of its own."""
        return _Unpickler(data, self._constants).load()

    def key(self, machine: Any) -> bytes:
        """Equal for equal machines: no matter which of their parts are the same object."""
        file = io.BytesIO()
        role = machine.role
        contents = [{name: value for name, value in vars(machine).items() if name != "role"}]
        names = {**self._names, id(machine): "machine"}
        if role is not None:
            # What refers back to each other, by name; what is in each, side by side.
            parts = {"role": role, **{name: part for name, part in vars(role).items() if hasattr(part, "_owner")}}
            names |= {id(part): name for name, part in parts.items()}
            contents += [vars(part) for part in parts.values()]
        _KeyPickler(file, names).dump(contents)
        return file.getvalue()
