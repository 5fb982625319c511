"""Docstrings of the installed Python as raw documents: real text that is on every machine, with nothing to download.

`docstrings:stdlib` is the standard library (its test suite aside), `docstrings:all` also every installed package.
"""

import ast
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..folder import HouseError
from .formats import Record, Unreadable, shown

PREFIX = "docstrings:"
SHORTEST = 40  # characters; a docstring must be longer
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def module_files(address: str) -> list[tuple[str, Path]]:
    """(name relative to its library folder, path) of the modules behind an address, in sorted order."""
    which = address.removeprefix(PREFIX)
    if which not in ("stdlib", "all"):
        raise HouseError(f"{address}: say docstrings:stdlib or docstrings:all")
    library = Path(sysconfig.get_path("stdlib"))
    files = _modules(library, NOT_LIBRARY | {"test"})
    if which == "all":
        packages = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
        files += [file for folder in sorted(packages) for file in _modules(folder, {"__pycache__"})]
    return files


def _modules(library: Path, skipped: set[str]) -> list[tuple[str, Path]]:
    found = []
    for folder, below, names in os.walk(library):
        below[:] = [name for name in below if name not in skipped]
        inner = os.path.relpath(folder, library).replace(os.sep, "/")
        prefix = "" if inner == "." else f"{inner}/"
        found += [(prefix + name, Path(folder, name)) for name in names if name.endswith(".py")]
    return sorted(found)


def modules_digest(files: list[tuple[str, Path]]) -> str:
    """sha256 over the names and bytes of the modules."""
    state = hashlib.sha256()
    for name, path in files:
        state.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return state.hexdigest()


def docstrings(files: list[tuple[str, Path]]) -> Iterator[tuple[str, Record | Unreadable]]:
    """(file, record) for each docstring longer than SHORTEST: its text, qualified_name, signature (of a class that of
    its __init__), kind (module, class, function, method), module and file. A module that cannot be parsed is one
    Unreadable."""
    for name, path in files:
        raw = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in strings
                tree = ast.parse(raw)
            found = list(_of_module(tree, name))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) or 0
            what = getattr(error, "msg", None) or str(error)
            yield name, Unreadable(name, line, f"{type(error).__name__}: {what}", shown(_line(raw, line)))
            continue
        for line, fields in found:
            yield name, Record(line, fields, None)


def _line(raw: bytes, number: int) -> bytes:
    lines = raw.split(b"\n")
    return lines[number - 1] if 0 < number <= len(lines) else b""


def _of_module(tree: ast.Module, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    given = {"module": module, "file": file}
    if (said := _docstring(tree)) is not None:
        yield 1, {"text": said, "qualified_name": module, "signature": None, "kind": "module", **given}
    for qualified_name, node, kind in _definitions(tree, module, "function"):
        if (said := _docstring(node)) is not None:
            signature = _signature(node)
            yield (
                node.lineno,
                {"text": said, "qualified_name": qualified_name, "signature": signature, "kind": kind, **given},
            )


def _definitions(parent: ast.AST, prefix: str, kind: str) -> Iterator[tuple[str, _Definition, str]]:
    """Functions and classes below `parent`, those inside if and try blocks too, in the order of the text."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield f"{prefix}.{node.name}", node, "class"
            yield from _definitions(node, f"{prefix}.{node.name}", "method")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node, kind
            yield from _definitions(node, f"{prefix}.{node.name}", "function")
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            yield from _definitions(node, prefix, kind)


def _docstring(node: ast.Module | _Definition) -> str | None:
    said = ast.get_docstring(node, clean=False)
    if said is None:
        return None
    said = inspect.cleandoc(said).strip()
    if len(said) <= SHORTEST or any("\ud800" <= sign <= "\udfff" for sign in said):
        return None
    return said


def _signature(node: _Definition) -> str | None:
    """`name(arguments) -> result`; of a class with its __init__'s arguments, self left out; None without one."""
    if isinstance(node, ast.ClassDef):
        made = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not made:
            return None
        arguments = made[0].args
        shorter = ast.arguments(
            posonlyargs=arguments.posonlyargs[1:] if arguments.posonlyargs else [],
            args=arguments.args if arguments.posonlyargs else arguments.args[1:],
            vararg=arguments.vararg, kwonlyargs=arguments.kwonlyargs, kw_defaults=arguments.kw_defaults,
            kwarg=arguments.kwarg, defaults=arguments.defaults,
        )  # fmt: skip
        return f"{node.name}({ast.unparse(shorter)})"
    result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"{node.name}({ast.unparse(node.args)}){result}"
