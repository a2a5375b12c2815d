"""Keeping a start: what is written, when nothing is, and which stay."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from kept_world import CASES, FACTS, opened, settings, started, stored

from lineshaft.engine.loop import Engine
from lineshaft.engine.starts import keep as keeping
from lineshaft.engine.starts import places, reopen, sources
from lineshaft.engine.starts.keep import Asked, keep
from lineshaft.engine.starts.key import starts_of
from lineshaft.engine.warm import fingerprint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.isa import STEP_CALLS, library

Tiny = Callable[..., Decoder]
pytestmark = [pytest.mark.skipif(library() is None, reason="no native kernels here"), pytest.mark.usefixtures("own_cache")]


@pytest.mark.parametrize("planted", ["full disk", "no place", "memory that is nobody's", "changed meanwhile"])
def test_what_can_t_be_kept_leaves_nothing(
    tiny: Tiny, tmp_path: Path, own_cache: Path, planted: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    if planted == "full disk":
        size = (folder / "model.safetensors").stat().st_size
        monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size))  # room for each weight, not for all
    elif planted == "no place":
        own_cache.write_text("a file is in the way")
    elif planted == "memory that is nobody's":
        monkeypatch.setattr(places, "weights_of", lambda model: iter(list(_weights_of(model))[:-3]))
    else:
        write = keeping._Writer._write_into
        monkeypatch.setattr(keeping._Writer, "_write_into", lambda *args: (write(*args), (folder / "config.json").touch()))
    started(folder, settings())
    assert not list(own_cache.glob("starts/*/*"))
    assert "this start is not kept" in capfd.readouterr().err


_weights_of = sources.weights_of


def test_a_checkpoint_that_is_changed_while_it_is_loaded_is_not_kept(tiny: Tiny, tmp_path: Path, own_cache: Path) -> None:
    """Else what was loaded would be found under the name of what is there now."""
    folder = stored(tiny("llama"), tmp_path / "model")
    asked = Asked.now(folder, settings())
    engine = Engine.load(folder, settings())
    other = tiny("llama")
    other.initialise(9)
    stored(other, folder)
    thread = keep(engine, asked, fingerprint(engine), FACTS)
    assert thread is not None
    thread.join()
    assert reopen.kept_for(folder, settings()) is None
    assert not list(own_cache.glob("starts/*/*"))


def test_every_address_of_a_call_is_known_as_one(tiny: Tiny) -> None:
    """An address taken for a number would be another process's in the next start."""
    for family, dtype, held, _ in CASES:
        engine = Engine(tiny(family).to(dtype), settings(cache_dtype=held))
        assert engine.runner.native is not None
        recorded = engine.runner.native.recorded
        assert recorded is not None
        named = places.Places(engine, recorded)
        for name, args in recorded.calls:
            named.of_call(name, args)  # all at these places are addresses
        known = [(own.ctypes.data, own.ctypes.data + len(own)) for own, _ in named._all]
        for name, args in recorded.calls:
            others = [arg for place, arg in enumerate(args) if place not in STEP_CALLS[name]]
            numbers = [number for arg in others for number in (arg if isinstance(arg, tuple | list) else [arg])]
            assert not [number for number in numbers if any(start <= number < stop for start, stop in known)], name


def test_a_start_that_is_there_is_not_written_again(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    started(folder, settings())
    monkeypatch.setattr(keeping._Writer, "_write_into", lambda *_: pytest.fail("written again"))
    started(folder, settings())


def test_a_user_without_a_cache_has_no_starts(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("could not determine home directory")

    folder = stored(tiny("llama"), tmp_path / "model")
    monkeypatch.delenv("LINESHAFT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    started(folder, settings())
    assert reopen.kept_for(folder, settings()) is None
    assert reopen.only_one(folder) is None


def test_the_checkpoints_that_were_started_last_are_kept(
    tiny: Tiny, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MOST_STARTS", 2)
    folders = [stored(tiny("llama"), tmp_path / name) for name in "abc"]
    for folder in folders:
        started(folder, settings())
        if folder.name == "b":  # opening one is using it
            os.utime(starts_of(folders[0]), (0, 0))
            os.utime(starts_of(folders[1]), (1, 1))
            assert opened(folders[0], settings()) is not None
    assert [reopen.kept_for(folder, settings()) is None for folder in folders] == [False, True, False]
    assert len(list((own_cache / "starts").iterdir())) == 2


def test_nothing_is_kept_or_looked_for_where_that_is_asked(tiny: Tiny, tmp_path: Path, own_cache: Path) -> None:
    folder, config = stored(tiny("llama"), tmp_path / "model"), settings(keep_start="nothing")
    engine = Engine.load(folder, config)
    assert keep(engine, Asked.now(folder, config), fingerprint(engine), FACTS) is None
    assert reopen.kept_for(folder, config) is None
    assert not own_cache.exists()
