"""Documentation of the modules that are compiled into Python or lie beside it as libraries, by looking at them.

Run as a program it prints all of it as JSON. `stdlib` does so in a fresh Python, because what a module shows changes
with the process: programs put their own functions into `sys`, tests and debuggers into many others. Hence it imports
nothing of lineshaft.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

Document = tuple[str, str]
"""Module path and text."""

LEFT_OUT = frozenset({"readline", "xxlimited", "xxlimited_35", "xxsubtype", "_xxtestfuzz", "_tkinter", "_ctypes_test"})
"""Modules whose import touches the terminal or loads a window system, and samples for writers of extensions."""
_METHODS = (types.BuiltinMethodType, types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType, staticmethod)
_IMPLIED = re.compile(r"\(\$(module|type)(, /)?(, )?")
"""The argument that Python passes by itself, as C code spells it in a signature."""


def module_names() -> list[str]:
    """Names of all compiled modules of this Python, without its tests."""
    names = set(sys.builtin_module_names) | {path.name.split(".")[0] for path in library_files()}
    return sorted(name for name in names - LEFT_OUT if "test" not in name)


def library_files() -> list[Path]:
    """The library files of compiled modules, by name."""
    folder = Path(sysconfig.get_config_var("DESTSHARED") or "")
    return sorted(path for path in folder.glob("*") if path.name.endswith(tuple(EXTENSION_SUFFIXES))) if folder.is_absolute() else []


def module(name: str) -> Iterator[Document]:
    """Documents of one compiled module; none when it can't be imported here (a system library is missing, say)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found = importlib.import_module(name)
    except (ImportError, OSError, SystemError):
        return
    if text := inspect.getdoc(found):
        yield (name, f"Help on built-in module {name}:\n\n{text}\n")
    for title, value in sorted(vars(found).items()):
        if inspect.isclass(value) and value.__name__ == title and _is_compiled(value):
            if shown := _class(value):
                yield (f"{name}.{title}", f"Help on class {title} in module {value.__module__}:\n\n{shown}")
        elif isinstance(value, types.BuiltinFunctionType) and (shown := _function(title, value)):
            yield (f"{name}.{title}", f"Help on built-in function {title} in module {name}:\n\n{shown}")


def _is_compiled(value: type) -> bool:
    """True for classes written in C: only their methods are descriptors of C functions."""
    return not any(isinstance(item, types.FunctionType) for item in vars(value).values())


def _class(value: type) -> str:
    own = vars(value)
    docs = [_own_doc(value)]
    docs += [_function(name, own[name]) for name in sorted(own) if isinstance(own[name], _METHODS)]
    written = [part.strip("\n") for part in docs if part]
    if not written:
        return ""
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    head = f"class {value.__name__}({bases})" if bases else f"class {value.__name__}"
    return f"{head}\n" + "\n\n".join(indented(part) for part in written) + "\n"


def _own_doc(value: object) -> str:
    """The cleaned docstring, never one inherited from a base."""
    doc = getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _function(name: str, value: object) -> str:
    doc = _own_doc(value)
    if not doc:
        return ""
    unknown = "" if isinstance(value, types.GetSetDescriptorType) else "(...)"
    signature = _IMPLIED.sub("(", getattr(value, "__text_signature__", None) or unknown)
    return f"{name}{signature.replace('$', '')}\n{indented(doc)}\n"


def indented(text: str) -> str:
    """Every line that is not blank moved four spaces to the right."""
    return "\n".join(f"    {line}" if line.strip() else "" for line in text.split("\n"))


if __name__ == "__main__":
    json.dump([document for name in module_names() for document in module(name)], sys.stdout)
