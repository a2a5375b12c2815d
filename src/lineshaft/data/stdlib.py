"""The Python standard library's own documentation as a source of documents: real text on every machine that can run us.

Help topics, and what `help()` would show of each module, class and function. Pure Python modules are parsed, never
imported; what is compiled is described by `compiled`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lineshaft.base.errors import SourceError
from lineshaft.base.files import digest
from lineshaft.data import compiled
from lineshaft.data.compiled import indented
from lineshaft.data.pieces import pieces
from lineshaft.data.raw import Noticed, Raw

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Folders that hold other people's packages, tests, or no source."""
TOPICS = "pydoc_data.topics"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class StandardLibrary:
    """The documentation of the library below `folder`, by default that of the running Python."""

    def __init__(self, folder: Path | None = None, *, with_compiled: bool = True) -> None:
        self._folder = folder or Path(sysconfig.get_path("stdlib"))
        self._compiled = compiled.module_names() if with_compiled else []
        self._modules = sorted(_modules(self._folder))
        if not self._modules:
            raise SourceError(f"{self._folder}: this Python has no library sources; name another data.source")
        self.skipped: Counter[str] = Counter()
        self.name = f"the standard library of {platform.python_implementation()} {platform.python_version()}"

    def digest(self) -> str:
        """SHA-256 over the content of every module file, and over the version and build of Python for what is compiled."""
        content = [[name, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in self._modules]
        return digest({"kind": "stdlib", "name": self.name, "modules": content, "compiled": self._compiled, "build": sys.version})

    def read(self, _: Noticed) -> Iterator[Raw]:
        """One document for each topic, module docstring, function and class (with its methods)."""
        for name, path in self._modules:
            yield from _finished(_topics(path) if name == TOPICS else _module(name, path))
        if self._compiled:
            yield from _finished(_described())


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module below `folder`."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name.isidentifier() and name not in LEFT_OUT]
        for path in (Path(here, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1].isidentifier():
                yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


def _finished(documents: Iterator[Raw]) -> Iterator[Raw]:
    """Long ones cut, and `<thing at 0x7f...>`, which differs from run to run, without its address, as in pydoc."""
    for raw in documents:
        parts = list(pieces(_ADDRESS.sub("", raw.text).splitlines(keepends=True)))
        for number, part in enumerate(parts):
            yield Raw(f"{raw.source}#{number}" if len(parts) > 1 else raw.source, part)


def _described() -> Iterator[Raw]:
    """Documents of the compiled modules, as a fresh Python without any packages sees them."""
    command = [sys.executable, "-I", "-S", compiled.__file__]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own file
    if done.returncode:
        last = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        raise SourceError(f"{sys.executable}: can't describe its compiled modules ({last}); name another data.source")
    for source, text in json.loads(done.stdout):
        yield Raw(source, text)


def _tree(path: Path) -> ast.Module | None:
    """The parsed file, or None for one in another Python's syntax, such as data of lib2to3."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old docstrings are no concern of ours
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _topics(path: Path) -> Iterator[Raw]:
    """The texts that `help("for")` and the like show."""
    tree = _tree(path)
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            yield from (Raw(f"topic {name}", topics[name]) for name in sorted(topics))


def _module(name: str, path: Path) -> Iterator[Raw]:
    tree = _tree(path)
    if tree is None:
        return
    if text := ast.get_docstring(tree):
        yield Raw(name, f"Help on module {name}:\n\n{text}\n")
    yield from _definitions(name, "", tree.body)


def _definitions(module: str, inside: str, body: list[ast.stmt]) -> Iterator[Raw]:
    """A document for each documented function and class of a module, nested classes included."""
    for node in _flat(body):
        title = f"{inside}{node.name}"
        if isinstance(node, ast.ClassDef):
            if text := _class(node):
                yield Raw(f"{module}.{title}", f"Help on class {title} in module {module}:\n\n{text}")
            yield from _definitions(module, f"{title}.", node.body)
        elif not inside and (text := _function(node)):
            yield Raw(f"{module}.{title}", f"Help on function {title} in module {module}:\n\n{text}")


def _flat(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Definitions of one level, those under `if`, `try` and `with` included."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            blocks = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            blocks += [handler.body for handler in getattr(node, "handlers", [])]
            for block in blocks:
                yield from _flat(block)


def _class(node: ast.ClassDef) -> str:
    """A class as help() shows it: its line, its docstring, its documented methods; "" when nothing is documented."""
    parts = [ast.get_docstring(node) or "", *(_function(item) for item in _flat(node.body) if not isinstance(item, ast.ClassDef))]
    written = [part.strip("\n") for part in parts if part]
    if not written:
        return ""
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"{head}\n" + "\n\n".join(indented(part) for part in written) + "\n"


def _function(node: Function) -> str:
    """A function as help() shows it: its signature, its docstring; "" without a docstring."""
    text = ast.get_docstring(node)
    if not text:
        return ""
    shown = node.name
    if not any(isinstance(mark, ast.Name) and mark.id in ("property", "cached_property") for mark in node.decorator_list):
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        shown = f"{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}{node.name}({ast.unparse(node.args)}){result}"
    return f"{shown}\n{indented(text)}\n"
