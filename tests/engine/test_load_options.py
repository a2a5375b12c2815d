"""What EngineConfig says of loading reaches the model: decoded weights, another number of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lineshaft.base.errors import ConfigError
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.packing import leave_file, pack
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE, Fp8Block, Integer
from lineshaft.ops.isa import library
from lineshaft.ops.packed import Packed, PackedHeads
from lineshaft.sched.request import Ask, Emitted, Sampling


@pytest.fixture
def folder(tiny: Callable[..., Decoder], tmp_path: Path) -> Path:
    model = tiny("deepseek_v3")
    for name, linear in model.linears().items():
        if name != "lm_head":
            linear.recode(Fp8Block())
    save_checkpoint(model, tmp_path, tmp_path)
    return tmp_path


@pytest.mark.parametrize(("dequantise", "formats"), [(False, {DENSE, Fp8Block()}), (True, {DENSE})])
def test_quantised_weights_are_kept_or_decoded(dequantise: bool, formats: set[object], folder: Path) -> None:
    engine = Engine.load(folder, EngineConfig(dequantise=dequantise))
    formats_of = (linear.format for linear in engine.model.linears().values())
    held = {fmt.origin if isinstance(fmt, Packed | PackedHeads) else fmt for fmt in formats_of}
    assert held == formats


def test_the_number_of_active_experts_is_the_one_asked_for(folder: Path) -> None:
    assert [router.moe.num_experts_per_tok for router in Engine.load(folder, EngineConfig(active_experts=3)).model.routers()] == [3]
    with pytest.raises(ConfigError, match="experts in reach"):
        Engine.load(folder, EngineConfig(active_experts=5))


@pytest.mark.parametrize("stored", ["dense", "fp8"])
def test_an_engine_leaves_the_checkpoints_file_where_all_products_are_packed(
    stored: str, folder: Path, tiny: Callable[..., Decoder], tmp_path: Path
) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists() or library() is None:
        pytest.skip("needs Linux's /proc and the native kernels")
    if stored == "dense":
        folder = tmp_path / "dense"
        save_checkpoint(tiny("deepseek_v3"), folder, folder)
    engine = Engine.load(folder, EngineConfig(cache_bytes=1 << 20))
    assert next(engine.model.parameters()).isfinite().all()
    assert str(folder / "model.safetensors") not in maps.read_text()


@pytest.mark.skipif(library() is None, reason="no native kernels here")
def test_what_the_kernels_can_not_take_stays_in_the_file(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny("llama")
    for name, linear in model.linears().items():
        if name != "lm_head":
            linear.recode(Fp8Block((16, 12)))  # the last block of inputs is smaller
    save_checkpoint(model, tmp_path, tmp_path)
    engine = Engine.load(tmp_path, EngineConfig(cache_bytes=1 << 20))
    assert any(isinstance(linear.format, Fp8Block) for linear in engine.model.linears().values())
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path / "model.safetensors") in maps.read_text()


def answers(folder: Path, **options: bool) -> list[int]:
    """Twelve tokens, the likeliest each time."""
    engine = Engine.load(folder, EngineConfig(cache_bytes=1 << 20, **options))
    engine.submit(Ask([5, 9, 2, 33, 7], Sampling(max_tokens=12, temperature=0, ignore_eos=True)))
    found: list[int] = []
    while not engine.idle:
        found += [event.token for event in engine.step() if isinstance(event, Emitted)]
    return found


@pytest.mark.parametrize("block", [(128, 128), (16, 16)])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_fp8_serves_what_decoded_weights_would(family: str, block: tuple[int, int], tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny(family)
    for name, linear in model.linears().items():
        if name != "lm_head":
            linear.recode(Fp8Block(block))
    save_checkpoint(model, tmp_path, tmp_path)
    found = answers(tmp_path)
    assert len(found) == 12 and found == answers(tmp_path, dequantise=True)
    if library() is not None:
        formats = [linear.format for linear in Engine.load(tmp_path, EngineConfig(cache_bytes=1 << 20)).model.linears().values()]
        assert all(isinstance(fmt, Packed | PackedHeads) for fmt in formats)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_layers_in_different_formats_serve_what_decoded_weights_would(family: str, tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    model = tiny(family)
    for number, linear in enumerate(model.linears().values()):
        linear.recode((DENSE, Integer(8), Integer(4, 8), Integer(4, 8, symmetric=False))[number % 4])
    save_checkpoint(model, tmp_path, tmp_path)
    found = answers(tmp_path)
    assert len(found) == 12 and found == answers(tmp_path, dequantise=True)


@pytest.mark.skipif(library() is None, reason="no native kernels here")
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_packed_weights_stay_where_they_were_laid_when_the_file_is_left(family: str, tiny: Callable[..., Decoder]) -> None:
    """A copy would take them out of huge pages, and time."""
    model = tiny(family)
    pack(model)
    places = {name: tensor.data_ptr() for name, linear in model.linears().items() for tensor in linear.tensors().values()}
    leave_file(model)
    assert places == {name: tensor.data_ptr() for name, linear in model.linears().items() for tensor in linear.tensors().values()}
