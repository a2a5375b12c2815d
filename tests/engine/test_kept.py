"""Starts that were kept: the same bits without torch, and nothing that was changed or damaged is taken for one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from kept_world import CASES, FACTS, SETTINGS, opened, settings, started, stored

from lineshaft.base.errors import Corrupt
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.rounds import Rounds
from lineshaft.engine.starts import format as layout
from lineshaft.engine.starts import key, reopen
from lineshaft.engine.starts.key import starts_of
from lineshaft.engine.starts.weights import WEIGHTS
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE, Integer
from lineshaft.ops.isa import library
from lineshaft.sched.request import Ask, Event, Sampling

Tiny = Callable[..., Decoder]
pytestmark = [pytest.mark.skipif(library() is None, reason="no native kernels here"), pytest.mark.usefixtures("own_cache")]


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


@pytest.mark.parametrize(
    ("family", "dtype", "held", "bits", "how"),
    [
        *((*case, "weights") for case in CASES),
        *(pytest.param(*case, "program", marks=[] if place % 2 == 0 else pytest.mark.slow) for place, case in enumerate(CASES)),
    ],
)
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


def test_a_start_that_ended_two_processes_which_opened_it_is_removed(tiny: Tiny, tmp_path: Path) -> None:
    folder = stored(tiny("llama"), tmp_path / "model")
    started(folder, settings())
    root = reopen.only_one(folder)
    assert root is not None
    (root / f"opening-{os.getppid()}-1").touch()  # of one that is still at it
    for ended in (1, 0):
        for number in range(ended):
            (root / f"opening-{2**30}-{number}").touch()  # stopped, perhaps by hand
        assert reopen.reopened(folder, root) is not None
        assert [mark.name for mark in root.glob("opening-*")] == [f"opening-{os.getppid()}-1"]
    for number in range(2):
        (root / f"opening-{2**30}-{number}").touch()
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
