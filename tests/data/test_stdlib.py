"""The standard library's documentation: rendered as help() shows it, never imported, without addresses."""

import inspect
import json.decoder
import sys
import textwrap
from pathlib import Path

import pytest

from lineshaft.base.errors import SourceError
from lineshaft.data import compiled
from lineshaft.data.raw import Noticed
from lineshaft.data.stdlib import StandardLibrary

LIBRARY = {
    "alpha.py": '''
        """What alpha is for."""
        raise RuntimeError("imported!")
        if True:
            def f(a, *, b: int = 3) -> str:
                """Say what f does.

                Example:
                    indented = f(1)
                """
        else:
            async def g():
                "Wait for <Thing object at 0x7f0123456789>."
        class C(Base, metaclass=M):
            """A class."""
            @property
            def size(self):
                """How large."""
            def undocumented(self): ...
            class Inner:
                def m(self):
                    """Inside."""
        def silent(): ...
        class Silent: x = 1
    ''',
    "pack/__init__.py": '"""A package."""',
    "pack/tests/test_x.py": '"""No test."""',
    "pack/old.py": 'print "python 2"',
    "test/x.py": '"""No test."""',
    "site-packages/y.py": '"""Not ours."""',
    "not-a-module/z.py": '"""Not importable."""',
    "pydoc_data/__init__.py": "",
    "pydoc_data/topics.py": 'topics = {"while": "The while statement", "assert": "The assert statement"}',
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, source in LIBRARY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(source))
    return tmp_path


def documents(folder: Path) -> dict[str, str]:
    return {raw.source: raw.text for raw in StandardLibrary(folder, with_compiled=False).read(Noticed())}


def test_every_documented_thing_is_a_document_and_nothing_else(library: Path):
    assert list(documents(library)) == ["alpha", "alpha.f", "alpha.g", "alpha.C", "alpha.C.Inner", "pack", "topic assert", "topic while"]


def test_a_function_shows_signature_and_docstring(library: Path):
    shown = (
        "Help on function f in module alpha:\n\nf(a, *, b: int=3) -> str\n    Say what f does.\n\n    Example:\n        indented = f(1)\n"
    )
    assert documents(library)["alpha.f"] == shown


def test_a_class_shows_its_documented_methods(library: Path):
    shown = "Help on class C in module alpha:\n\nclass C(Base)\n    A class.\n\n    size\n        How large.\n"
    assert documents(library)["alpha.C"] == shown
    assert "m(self)\n        Inside." in documents(library)["alpha.C.Inner"]


def test_addresses_are_taken_off(library: Path):
    assert documents(library)["alpha.g"].endswith("async g()\n    Wait for <Thing object>.\n")


def test_a_folder_without_sources_is_refused(tmp_path: Path):
    with pytest.raises(SourceError, match="no library sources"):
        StandardLibrary(tmp_path)


def test_the_digest_follows_the_sources(library: Path):
    before = StandardLibrary(library, with_compiled=False).digest()
    assert before == StandardLibrary(library, with_compiled=False).digest()
    (library / "pack" / "__init__.py").write_text('"""Another package."""')
    assert before != StandardLibrary(library, with_compiled=False).digest()


def test_real_docstrings_are_those_that_inspect_sees():
    package = Path(json.__file__).parent
    found = documents(package)
    decode = inspect.getdoc(json.decoder.JSONDecoder.decode)
    assert decode is not None
    assert textwrap.indent(decode, " " * 8, lambda line: bool(line.strip())) in found["decoder.JSONDecoder"]
    assert f"raw_decode{inspect.signature(json.decoder.JSONDecoder.raw_decode)}" in found["decoder.JSONDecoder"]


def test_compiled_modules_are_described():
    found = dict(compiled.module("math"))
    assert found["math.gcd"] == "Help on built-in function gcd in module math:\n\ngcd(*integers)\n    Greatest Common Divisor.\n"
    assert inspect.getdoc(sys.modules["math"]) in found["math"]
    builtins = dict(compiled.module("builtins"))
    assert "split(self, /, sep=None, maxsplit=-1)" in builtins["builtins.str"]
    assert "Return self" not in builtins["builtins.frozenset"]  # slot wrappers say the same everywhere


def test_a_compiled_module_that_cannot_be_imported_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "_missing_here", None)
    assert list(compiled.module("_missing_here")) == []


def test_what_this_process_did_to_its_modules_does_not_show(library: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("excepthook", "getsizeof"):
        monkeypatch.setattr(sys, name, lambda *_: None)
    found = {raw.source: raw.text for raw in StandardLibrary(library).read(Noticed())}
    assert "Handle an exception" in found["sys.excepthook"]
    assert "Return the size of object in bytes" in found["sys.getsizeof"]
    assert not any(" at 0x" in text for text in found.values())


def test_modules_that_touch_the_terminal_are_not_imported():
    assert {"sys", "builtins"} <= set(compiled.module_names())
    assert not {"readline", "_testcapi", "_tkinter"} & set(compiled.module_names())
