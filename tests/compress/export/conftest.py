"""Checkpoints that several tests of exports read, each written once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not find helpers

from export_toys import compressed, in_bfloat16, made

Source = Callable[..., Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """source(toy, form): its checkpoint, in a form of FORMS, `bf16`, or as it is; nobody writes to it."""
    found: dict[tuple[str, str], Path] = {}

    def get(name: str, form: str = "") -> Path:
        if (name, form) not in found:
            folder = tmp_path_factory.mktemp(name) / "hf"
            if not form:
                made(name, folder)
            elif form == "bf16":
                in_bfloat16(get(name), folder)
            else:
                compressed(get(name), folder, form)
            found[name, form] = folder
        return found[name, form]

    return get
