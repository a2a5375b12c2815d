"""The tests guard the building, too: sizes, floors, docstrings, and what must never stand in a source file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from importlinter import cli as import_linter

from lineshaft.base import config, errors

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lineshaft"
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MODULES = [path for path in SOURCES if path.name != "__main__.py"]  # importing a program may start it
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def settings() -> dict[str, object]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"])


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes and functions at the top of a module, and the public methods of those classes."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert ast.get_docstring(tree_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_function_is_longer_than_sixty_lines(path: Path) -> None:
    found = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in found if node.end_lineno and node.end_lineno - node.lineno >= 60] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    """A method that only overrides or implements what a base or protocol describes may leave it to that."""
    inherits = {
        f"{node.name}.{item.name}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and node.bases
        for item in node.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and is_inherited(path, node.name, item.name)
    }
    silent = [name for name, node in public(tree_of(path).body) if not ast.get_docstring(node) and name not in inherits]
    assert silent == []


def is_inherited(path: Path, owner: str, method: str) -> bool:
    module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    return any(method in vars(base) for base in inspect.getmro(getattr(module, owner))[1:])


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=name_of)
def test_a_package_file_holds_its_docstring_and_nothing_else(path: Path) -> None:
    body = tree_of(path).body
    assert len(body) == 1
    assert ast.get_docstring(tree_of(path))


def test_every_package_stands_on_a_floor() -> None:
    (floors,) = [contract["layers"] for contract in settings()["contracts"] if contract["type"] == "layers"]
    standing = {name.strip() for floor in floors for name in floor.split("|")}
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.rglob("*.py"))}
    assert packages - standing == set()
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_the_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "src"))
    kept = import_linter.lint_imports(config_filename="pyproject.toml", no_cache=True) == import_linter.EXIT_STATUS_SUCCESS
    assert kept, capsys.readouterr().out


def test_no_two_modules_import_each_other_however_far_round() -> None:
    graph = grimp.build_graph("lineshaft", cache_dir=None)
    left = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


def test_every_error_is_in_the_tree() -> None:
    """Nobody derives errors of their own elsewhere: the server and the command line could not tell whose fault they are."""
    strays = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            bases = {ast.unparse(base).split(".")[-1] for base in node.bases} if isinstance(node, ast.ClassDef) else set()
            ours = {name for name, item in vars(errors).items() if inspect.isclass(item)} | {
                "Exception",
                "ValueError",
                "RuntimeError",
                "OSError",
            }
            if bases & ours and path != Path(errors.__file__):
                strays.append(f"{name_of(path)}: {node.name}")
    assert strays == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_pickled_and_no_error_is_hushed(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
            assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.save", "torch.load", "np.load", "numpy.load", "yaml.unsafe_load", "yaml.full_load")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            raise AssertionError(f"line {node.lineno}: allow_pickle")
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            hushed = caught in ("everything", "Exception", "BaseException") and all(
                isinstance(item, ast.Pass | ast.Continue) for item in node.body
            )
            assert not hushed, f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_json_schema_of_every_config_can_be_written(path: Path) -> None:
    """The recipe's schema and the command line are made from it."""
    module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"))
    for item in vars(module).values():
        if inspect.isclass(item) and issubclass(item, config.Config) and item.__module__ == module.__name__:
            assert item.model_json_schema()["type"] == "object"


def ours() -> list[Path]:
    """Files that git tracks or would track."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git here, so what belongs to the source can't be told")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_a_place_of_somebodys_machine() -> None:
    home = re.compile(rb"(?<![\w.])(/home/[a-z]|/root/|/Users/[A-Za-z]|C:\\\\Users)")
    assert [name_of(path) for path in ours() if path != Path(__file__) and home.search(path.read_bytes())] == []


def test_no_file_holds_what_looks_like_a_key() -> None:
    key = re.compile(
        rb"(sk-[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY)"
    )
    assert [name_of(path) for path in ours() if path != Path(__file__) and key.search(path.read_bytes())] == []


def test_the_package_imported_here_is_the_one_beside_these_tests() -> None:
    found = importlib.util.find_spec("lineshaft")
    assert found
    assert found.origin
    assert Path(found.origin).parents[1].samefile(ROOT / "src")
