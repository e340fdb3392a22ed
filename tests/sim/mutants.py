"""Mutants of the code under test: one small change each, made in memory to one function (see `mutate.py`).

What is changed: a condition is taken for true or false, or loses one of its parts; a comparison loses or gains its
boundary; + 1 is left out; a statement, an action of a list, or a durable write before what follows from it is left out;
two neighbours change places; min is max.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

SAVES = {"save", "save_state", "save_bits", "sync_volumes"}  # (then): an action that ends with ``then``
STORES = {"SaveBits", "SaveState", "SyncJournal", "SyncVolumes", "OpenUndo", "MarkJournal", "Forget", "HaltApply"}
TOKENS = {"later", "expect", "_expect"}  # (then): the token of such an action
SILENT = {"Event", "say", "log", "warning", "info", "debug"}  # what people read and nothing depends on
FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef
Change = tuple[str, Callable[[], None], Callable[[], None]]
"""What it is called, how it is made in the tree, and how it is taken back"""


@dataclass(frozen=True)
class Mutant:
    """One change of one function of a module; ``number`` counts them within the module."""

    module: str
    number: int
    function: str
    line: int
    what: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.module}#{self.number} {self.function}:{self.line} {self.what}: {self.before} -> {self.after}"


def mutants_of(name: str) -> list[Mutant]:
    """All of a module, in the order of its text."""
    return [mutant for mutant, _ in _walk(name)]


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The module has the change for as long as this lasts."""
    code = next(code for each, code in _walk(mutant.module, mutant.number) if each.number == mutant.number)
    function = _function(importlib.import_module(mutant.module), mutant.function)
    before, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = before


def _function(module: ModuleType, qualified: str) -> FunctionType:
    found: Any = module
    for part in qualified.split("."):
        found = inspect.getattr_static(found, part)
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, (classmethod, staticmethod)):
        found = found.__func__
    found = inspect.unwrap(found)
    assert isinstance(found, FunctionType)
    return found


def _walk(name: str, only: int | None = None) -> Iterator[tuple[Mutant, CodeType]]:
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    tree = ast.parse(source)
    number = 0
    for qualified, function in _functions(tree):
        seen = {ast.unparse(function)}
        for line, what, make, undo in _changes(function):
            lines = ast.unparse(function).splitlines()
            make()
            text = ast.unparse(function)
            if text in seen:
                undo()
                continue
            seen.add(text)
            number += 1
            if only is None or only == number:
                before, after = _difference(lines, text.splitlines())
                mutant = Mutant(name, number, qualified, line, what, before, after)
                code = _compiled(tree, module, qualified) if only is not None else _NO_CODE
                undo()
                yield mutant, code
            else:
                undo()


_NO_CODE = (lambda: None).__code__


def _functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    for node in tree.body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, Function):
                    yield f"{node.name}.{each.name}", each


def _compiled(tree: ast.Module, module: ModuleType, qualified: str) -> CodeType:
    fixed = ast.fix_missing_locations(copy.deepcopy(tree))
    wanted = [compile(fixed, module.__file__ or "", "exec")]
    while wanted:
        code = wanted.pop()
        if code.co_qualname == qualified:
            return code
        wanted += [each for each in code.co_consts if isinstance(each, CodeType)]
    raise AssertionError(f"no code of {qualified}")


def _difference(before: list[str], after: list[str]) -> tuple[str, str]:
    while before and after and before[0] == after[0]:
        before, after = before[1:], after[1:]
    while before and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return " | ".join(map(str.strip, before)) or "-", " | ".join(map(str.strip, after)) or "-"


def _changes(function: Function) -> Iterator[tuple[int, str, Callable[[], None], Callable[[], None]]]:
    for node in ast.walk(function):
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                for what, other in _other(node, field, value):
                    yield (value.lineno, what, *_replace(node, field, other))
            elif isinstance(value, list):
                yield from _changes_of_list(node, field, value)


def _changes_of_list(
    node: ast.AST, field: str, values: list[Any]
) -> Iterator[tuple[int, str, Callable[[], None], Callable[[], None]]]:
    for index, value in enumerate(values):
        if isinstance(value, ast.expr):
            for what, other in _other(node, field, value):
                yield (value.lineno, what, *_replace_at(values, index, [other]))
            if isinstance(node, ast.List) and field == "elts" and not _silent(value):
                yield (value.lineno, "left out", *_replace_at(values, index, []))
                if index + 1 < len(values) and not _silent(values[index + 1]):
                    yield (value.lineno, "swapped", *_replace_at(values, index, [values[index + 1], value], 2))
            if isinstance(node, ast.comprehension) and field == "ifs":
                yield (value.lineno, "left out", *_replace_at(values, index, []))
        elif isinstance(value, ast.stmt):
            for what, others in _other_statements(value):
                yield (value.lineno, what, *_replace_at(values, index, others))
            following = values[index + 1] if index + 1 < len(values) else None
            if _movable(value) and _movable(following):
                yield (value.lineno, "swapped", *_replace_at(values, index, [following, value], 2))


def _replace(node: ast.AST, field: str, other: ast.AST) -> tuple[Callable[[], None], Callable[[], None]]:
    value = getattr(node, field)
    return lambda: setattr(node, field, other), lambda: setattr(node, field, value)


def _replace_at(
    values: list[Any], index: int, others: list[Any], count: int = 1
) -> tuple[Callable[[], None], Callable[[], None]]:
    old = list(values)

    def make() -> None:
        values[index : index + count] = others

    def undo() -> None:
        values[:] = old

    return make, undo


def _silent(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) in SILENT


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _movable(node: ast.stmt | None) -> bool:
    return isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign)) and not _docstring(node)


def _docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _other_statements(node: ast.stmt) -> Iterator[tuple[str, list[ast.stmt]]]:
    """(what, statements to be in its place)"""
    if isinstance(node, ast.Expr):
        if not _docstring(node) and not _silent(node.value) and not isinstance(node.value, (ast.Yield, ast.YieldFrom)):
            yield "left out", [ast.Pass()]
    elif isinstance(node, ast.Assign):
        if all(isinstance(each, (ast.Attribute, ast.Subscript)) for each in node.targets):
            yield "left out", [ast.Pass()]
        if len(node.targets) > 1:
            for index in range(len(node.targets)):
                left = [each for at, each in enumerate(node.targets) if at != index]
                yield "left out", [ast.Assign(left, node.value, lineno=node.lineno)]
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
            for index, (each, _) in enumerate(pairs):
                if isinstance(each, (ast.Attribute, ast.Subscript)):
                    rest = [pair for at, pair in enumerate(pairs) if at != index]
                    names, contents = ast.Tuple([a for a, _ in rest], ast.Store()), ast.Tuple([b for _, b in rest])
                    yield "left out", [ast.Assign([names], contents, lineno=node.lineno)]
    elif isinstance(node, (ast.AugAssign, ast.Delete, ast.For, ast.Continue, ast.Break, ast.Raise)):
        yield "left out", [ast.Pass()]


def _other(parent: ast.AST, field: str, node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """(what, an expression to be in its place)"""
    if field == "test" and isinstance(parent, (ast.If, ast.IfExp)):
        yield "taken for true", ast.Constant(value=True)
        yield "taken for false", ast.Constant(value=False)
    if isinstance(node, ast.BoolOp):
        for index in range(len(node.values)):
            left = [each for at, each in enumerate(node.values) if at != index]
            yield "part left out", left[0] if len(left) == 1 else ast.BoolOp(node.op, left)
    elif isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            ops = list(node.ops)
            ops[index] = FLIPPED[type(op)]()
            yield "other comparison", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not left out", node.operand
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        if not any(isinstance(each, (ast.JoinedStr, ast.Constant)) and not _number(each) for each in
                   (node.left, node.right)):  # fmt: skip
            yield "part left out", node.left
            if isinstance(node.op, ast.Add):
                yield "part left out", node.right
            if isinstance(node.op, ast.Sub) or _number(node.right):
                other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
                yield "other sign", ast.BinOp(node.left, other, node.right)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "other value", ast.Constant(value=not node.value)
    elif isinstance(node, ast.Lambda) and isinstance(node.body, ast.List) and node.body.elts:
        yield "left out", ast.Lambda(node.args, ast.List([], ast.Load()))


def _number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def _other_calls(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    name = _name(node.func)
    if name in ("min", "max") and isinstance(node.func, ast.Name):
        other = ast.Name("max" if name == "min" else "min", ast.Load())
        yield "min and max", ast.Call(other, node.args, node.keywords)
        if len(node.args) == 2 and not any(isinstance(each, ast.Starred) for each in node.args):
            yield "part left out", node.args[0]
            yield "part left out", node.args[1]
    then = _continuation(node)
    if then is not None:
        yield "not stored", ast.Starred(ast.Call(then, [ast.Constant(value=0.0)], []), ast.Load())


def _continuation(node: ast.Call) -> ast.expr | None:
    name = _name(node.func)
    if name in SAVES and len(node.args) == 1:
        return node.args[0]
    if name in STORES and node.args:
        token = node.args[-1]
        if isinstance(token, ast.Call) and _name(token.func) in TOKENS and token.args:
            return token.args[0]
    return None
