"""Starts that are kept: the same bits without torch, and nothing that was changed or damaged is taken for one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from lineshaft.base.errors import Corrupt
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.rounds import Rounds
from lineshaft.engine.starts import format as layout
from lineshaft.engine.starts import keep as keeping
from lineshaft.engine.starts import key, places, reopen, sources
from lineshaft.engine.starts.keep import Asked, keep
from lineshaft.engine.starts.key import starts_of
from lineshaft.engine.starts.weights import WEIGHTS
from lineshaft.engine.warm import fingerprint
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE, Integer
from lineshaft.ops.isa import STEP_CALLS, library
from lineshaft.sched.request import Ask, Event, Sampling

Tiny = Callable[..., Decoder]
pytestmark = pytest.mark.skipif(library() is None, reason="no native kernels here")
SETTINGS: dict[str, Any] = {"page_tokens": 4, "cache_bytes": 1 << 18, "scheduler": {"step_tokens": 24, "max_batch": 6}}
FACTS = {"told": ["all is well"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINESHAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(model: Decoder, folder: Path) -> Path:
    save_checkpoint(model, folder, folder)
    return folder


def settings(**more: object) -> EngineConfig:
    return EngineConfig.model_validate(SETTINGS | more)


def started(folder: Path, config: EngineConfig) -> Engine:
    """The engine of a first start, when what it leaves is on the disk."""
    asked = Asked.now(folder, config)
    engine = Engine.load(folder, config)
    thread = keep(engine, asked, fingerprint(engine), FACTS)
    assert thread is not None
    thread.join()
    return engine


def opened(folder: Path, config: EngineConfig) -> reopen.Reopened | None:
    root = reopen.kept_for(folder, config)
    return reopen.reopened(folder, root) if root else None


def told(engine: Rounds) -> list[Event]:
    """All that some requests hear: chunked, side by side, beginning alike, with scores, an embedding, penalties and luck of their own."""
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]
    alike = Sampling(max_tokens=9, top_p=0.9, logprobs=2, frequency_penalty=0.5, ignore_eos=True)
    engine.submit(Ask(text, alike.model_copy(update={"seed": 7}), copies=3))
    events = [event for _ in range(5) for event in engine.step()]  # alone: its copies share a page that each writes into
    for number, task in enumerate(["generate", "score", "embed", "generate", "score", "generate", "embed"]):
        sampling = alike.model_copy(update={"temperature": number % 3 / 2, "seed": number})
        engine.submit(Ask([*text[: 5 + 2 * number], number], sampling, task, copies=1 if task == "embed" else 2))
    while not engine.idle:
        events += engine.step()
        engine.scheduler.check()
    return events


CASES = [
    ("llama", torch.float32, "auto", None),
    ("llama", torch.bfloat16, "auto", None),
    ("mistral", torch.bfloat16, "int8", None),
    ("qwen3", torch.float32, "auto", None),
    ("qwen3_moe", torch.bfloat16, "auto", None),
    ("deepseek_v3", torch.float32, "auto", None),
    ("deepseek_v3", torch.bfloat16, "int8", None),
    ("llama", torch.float32, "auto", 8),
    ("qwen3", torch.bfloat16, "auto", 4),
]


@pytest.mark.parametrize("how", ["weights", "program"])
@pytest.mark.parametrize(("family", "dtype", "held", "bits"), CASES)
def test_a_kept_start_gives_the_same_bits(
    tiny: Tiny, tmp_path: Path, family: str, dtype: torch.dtype, held: str, bits: int | None, how: str
) -> None:
    model = tiny(family)
    for linear in model.linears().values() if bits else []:
        linear.recode(Integer(bits=bits, group=8) if linear.in_features % 8 == 0 else DENSE)
    folder = stored(model.to(dtype), tmp_path / "model")
    config = settings(cache_dtype=held, keep_start=how)
    engine = started(folder, config)
    again = opened(folder, config)
    assert again is not None
    assert again.facts == FACTS
    assert again.engine.bounds == engine.bounds
    wanted = [told(engine) for _ in range(2)]  # the second time some of it is found in the cache
    assert told(again.engine) == wanted[0]
    again.settle()
    assert told(again.engine) == wanted[1]


def test_dense_weights_take_no_place_where_only_the_program_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    sizes = {}
    for how in ("weights", "program"):
        started(folder, settings(keep_start=how))
        root = reopen.kept_for(folder, settings(keep_start=how))
        assert root is not None
        sizes[how] = (root / WEIGHTS).stat().st_size
    assert sizes["weights"] >= (folder / "model.safetensors").stat().st_size / 2
    assert sizes["program"] <= 128  # angles' speeds, which are in no checkpoint
    assert len(list(starts_of(folder).iterdir())) == 1  # the other one has gone


WITHOUT_TORCH = """
import sys
from pathlib import Path
from lineshaft.engine.starts import reopen
from lineshaft.engine.config import EngineConfig
from lineshaft.sched.request import Ask, Emitted, Sampling
from lineshaft.serve import reopening

folder, config = Path(sys.argv[1]), EngineConfig.model_validate_json(sys.argv[2])
engine = reopen.reopened(folder, reopen.kept_for(folder, config)).engine
engine.submit(Ask([3, 1, 4, 1, 5], Sampling(max_tokens=6, temperature=0.8, seed=1, logprobs=1, ignore_eos=True)))
tokens = []
while not engine.idle:
    tokens += [event.token for event in engine.step() if isinstance(event, Emitted)]
print(*tokens, "torch" in sys.modules)
"""


def test_it_needs_no_torch(tiny: Tiny, tmp_path: Path) -> None:
    folder = stored(tiny("deepseek_v3").to(torch.bfloat16), tmp_path / "model")
    engine = started(folder, settings())
    engine.submit(Ask([3, 1, 4, 1, 5], Sampling(max_tokens=6, temperature=0.8, seed=1, logprobs=1, ignore_eos=True)))
    tokens: list[object] = []
    while not engine.idle:
        tokens += [event.token for event in engine.step() if hasattr(event, "token")]
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), settings().model_dump_json()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert done.stdout.split() == [*map(str, tokens), "False"]


@pytest.mark.parametrize("changed", ["weights", "config", "settings", "threads", "one more file"])
def test_what_it_hangs_on_was_changed(tiny: Tiny, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = stored(tiny("llama"), tmp_path / "model"), settings()
    started(folder, config)
    assert reopen.kept_for(folder, config) is not None
    path = folder / ("model.safetensors" if changed == "weights" else "config.json")
    if changed in ("weights", "config"):
        before = path.stat()
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # who sets times back is noticed
    elif changed == "threads":
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
    elif changed == "one more file":
        (folder / "generation_config.json").write_text("{}")
    else:
        config = settings(max_context=32)
    assert reopen.kept_for(folder, config) is None


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.9])
def test_a_damaged_program_is_removed_and_said(
    tiny: Tiny, tmp_path: Path, place: float, cut: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    started(folder, settings())
    root = reopen.kept_for(folder, settings())
    assert root is not None
    content = bytearray((root / layout.PROGRAM).read_bytes())
    at = int(place * len(content))
    content[at:] = b"" if cut else bytes([content[at] ^ 4]) + content[at + 1 :]
    (root / layout.PROGRAM).write_bytes(content)
    assert reopen.reopened(folder, root) is None
    assert "the start that was kept can't be used, and is removed" in capfd.readouterr().err
    assert not root.exists()


def changed_program(root: Path, **fields: object) -> None:
    found = msgspec.to_builtins(layout.read(root / layout.PROGRAM))
    layout.write(root / layout.PROGRAM, msgspec.convert(found | fields, layout.Kept))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"fingerprint": "0"}, "it gives other numbers than it did"),
        ({"calls": [["system", ["true"]]]}, "system is no call of a step"),
        ({"calls": [["add", [0, {"region": 0, "offset": 1 << 40}, 0, 0, 1, 1]]]}, "byte 1099511627776 of a region"),
        ({"calls": [["add", [0, {"region": 10**6, "offset": 0}, 0, 0, 1, 1]]]}, "index out of range"),
        ({"calls": [["add", [0, 1 << 20, 0, 0, 1, 1]]]}, "Expected `object`, got `int`"),
        ({"key": "another"}, "it was kept under another name"),
        ({"token_bytes": [64]}, "StopIteration"),
    ],
)
def test_a_program_that_is_another_is_refused(
    tiny: Tiny, tmp_path: Path, fields: dict[str, object], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    started(folder, settings())
    root = reopen.kept_for(folder, settings())
    assert root is not None
    changed_program(root, **fields)
    assert reopen.reopened(folder, root) is None
    assert reason in capfd.readouterr().err


def test_damaged_weights_are_found_by_the_first_tokens_or_when_they_are_moved_in(tiny: Tiny, tmp_path: Path) -> None:
    folder = stored(tiny("qwen3_moe"), tmp_path / "model")
    found = set()
    for step in range(1, 9):
        started(folder, settings())
        root = reopen.kept_for(folder, settings())
        assert root is not None
        with (root / WEIGHTS).open("r+b") as weights:
            weights.seek(step * (root / WEIGHTS).stat().st_size // 9)
            byte = weights.read(1)
            weights.seek(-1, os.SEEK_CUR)
            weights.write(bytes([byte[0] ^ 1]))  # the least change, of the least bit or another
        again = reopen.reopened(folder, root)
        found.add(again is None)
        if again is not None:
            with pytest.raises(Corrupt, match="kept weights are not those that were written"):
                again.settle()
            shutil.rmtree(root)  # as the server does
        assert not root.exists()
    assert False in found  # some flips change no logit that was looked at


def test_a_folder_that_others_may_write_into_is_not_trusted(tiny: Tiny, tmp_path: Path) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    started(folder, settings())
    root = reopen.kept_for(folder, settings())
    assert root is not None
    root.chmod(0o777)
    assert reopen.reopened(folder, root) is None


def test_where_memory_is_short_it_is_left_for_later(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = stored(tiny("llama"), tmp_path / "model"), EngineConfig.model_validate(SETTINGS | {"cache_bytes": None})
    started(folder, config)
    root = reopen.kept_for(folder, config)
    assert root is not None
    monkeypatch.setattr(reopen, "available_memory_bytes", lambda: 1 << 20)
    assert reopen.reopened(folder, root) is None
    assert root.exists()


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


def test_a_program_of_another_build_is_not_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is opened before the settings are known."""
    folder = stored(tiny("llama"), tmp_path / "model")
    started(folder, settings())
    root = reopen.only_one(folder)
    assert root is not None
    monkeypatch.setattr(key, "VERSION", -1)
    monkeypatch.setattr(reopen, "_engine", lambda *_: pytest.fail("it was run"))
    assert reopen.reopened(folder, root) is None
    assert root.exists()


def test_a_start_that_ended_the_process_which_opened_it_is_removed(tiny: Tiny, tmp_path: Path) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    started(folder, settings())
    root = reopen.only_one(folder)
    assert root is not None
    (root / f"opening-{os.getppid()}").touch()  # of one that is still at it
    assert reopen.reopened(folder, root) is not None
    (root / f"opening-{2**30}").touch()
    assert reopen.reopened(folder, root) is None
    assert not root.exists()


@pytest.mark.parametrize("error", [OSError(12, "no memory"), MemoryError("none"), RuntimeError("busy")])
def test_what_passes_is_no_damage(tiny: Tiny, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    started(folder, settings())
    root = reopen.only_one(folder)
    assert root is not None

    def raised(size: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(reopen, "huge", raised)
        assert reopen.reopened(folder, root) is None
    assert reopen.reopened(folder, root) is not None


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
