"""A user must be able to leave: what we compress, transformers with compressed-tensors loads and runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import letter_line
import pytest
import torch
import transformers
from calibrated_line import ROWS, line
from toys import Theirs, agree, logits_of, prompt, written_by_transformers

from lineshaft.compress.config import CompressConfig
from lineshaft.compress.stage import compress
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE, Integer

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from integer_cases import KINDS

FORMS = [None, 4]
SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], tuple[Decoder, Path]]:
    def make(name: str, group: int | None) -> tuple[Decoder, Path]:
        root = tmp_path_factory.mktemp(name)
        written_by_transformers(name, root / "hf")
        model = load_checkpoint(root / "hf")
        compress(model, CompressConfig(group=group))
        save_checkpoint(model, root / "out", root / "hf")
        return model, root / "out"

    return make


def loaded(folder: Path, *, dequantize: bool = False) -> Theirs:
    asked = transformers.CompressedTensorsConfig(dequantize=dequantize)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:  # what it unpacked while loading it keeps, and computes, in the dtype of the scales
            parameter.data = parameter.data.float()
    return Theirs(folder, model.eval())


@torch.no_grad()
def in_half_precision(model: Decoder, part: str) -> Decoder:
    """Our model with the weights of some layers rounded to FP16, as transformers does where it unpacks them at load time."""
    for name, linear in model.linears().items():
        if linear.format != DENSE and part in name:
            half = linear.dense_weight(torch.float16)
            linear.recode(DENSE)
            linear.weight.copy_(half)
    return model


@pytest.mark.parametrize("group", FORMS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-window", "qwen2", "qwen3"])
def test_logits_are_ours(name: str, group: int | None, compressed: Callable[..., tuple[Decoder, Path]]) -> None:
    ours, folder = compressed(name, group)
    assert agree(logits_of(ours, prompt(20)), loaded(folder).logits(prompt(20)))


@pytest.mark.parametrize("group", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_with_the_head_compressed_as_well_they_are_ours(name: str, group: int | None, tmp_path: Path) -> None:
    written_by_transformers(name, tmp_path / "hf")
    model = load_checkpoint(tmp_path / "hf")
    assert "lm_head" in compress(model, CompressConfig(group=group, skip=[]))
    save_checkpoint(model, tmp_path / "out", tmp_path / "hf")
    assert agree(logits_of(model, prompt(20)), loaded(tmp_path / "out").logits(prompt(20)))


@pytest.mark.parametrize("step", ["gptq", "awq"])
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_what_calibration_made_loads_as_well(shape: str, step: str, tmp_path: Path) -> None:
    points = {"points": 4} if step == "awq" else {}
    made = line(tmp_path / "store", shape).compress(step, bits=4, group=8, **ROWS, **points)
    text = [token % letter_line.VOCABULARY for token in prompt(20)]
    assert agree(logits_of(load_checkpoint(made.root), text), loaded(made.root).logits(text))


@pytest.mark.parametrize(
    ("shape", "range_"),
    [("llama", "mse"), ("qwen3", "minmax"), pytest.param("llama", "minmax", marks=SLOW), pytest.param("qwen3", "mse", marks=SLOW)],
)
def test_with_one_scale_for_activations_logits_are_ours(shape: str, range_: str, tmp_path: Path) -> None:
    """It rounds by the scale that is stored, as we do: to a tie here and there."""
    made = line(tmp_path / "store", shape).compress("static", **ROWS, range=range_)
    text = [token % letter_line.VOCABULARY for token in prompt(20)]
    model = load_checkpoint(made.root)
    mine = logits_of(model, text)
    assert agree(mine, loaded(made.root).logits(text), 2e-3)
    for linear in model.linears().values():
        if isinstance(linear.format, Integer):
            linear.format = replace(linear.format, activations=None)
    assert (logits_of(model, text) - mine).norm() > 5e-3 * mine.norm()


@pytest.mark.parametrize("group", FORMS)
def test_with_experts_they_are_ours_but_for_the_half_precision_of_their_experts(
    group: int | None, compressed: Callable[..., tuple[Decoder, Path]]
) -> None:
    """transformers 5 keeps the experts of a layer in one dense tensor, unpacked while it loads."""
    ours, folder = compressed("deepseek-groups", group)
    theirs = loaded(folder).logits(prompt(20))
    assert agree(logits_of(ours, prompt(20)), theirs, 2e-2)
    assert agree(logits_of(in_half_precision(ours, "mlp.experts"), prompt(20)), theirs, 1e-4)


@pytest.mark.parametrize("group", FORMS)
@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_unpacked_at_load_time_it_is_the_same_model(name: str, group: int | None, compressed: Callable[..., tuple[Decoder, Path]]) -> None:
    ours, folder = compressed(name, group)
    theirs = loaded(folder, dequantize=True).logits(prompt(20))
    assert agree(logits_of(in_half_precision(ours, ""), prompt(20)), theirs, 1e-4)


def recoded(name: str, fmt: Integer, root: Path) -> tuple[Decoder, Path]:
    """Every layer in this format but the head, saved."""
    model = load_checkpoint(written_by_transformers(name, root / "hf").folder)
    for layer, linear in model.linears().items():
        if layer != "lm_head":
            linear.recode(fmt)
    save_checkpoint(model, root / "out", root / "hf")
    return model, root / "out"


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["llama-biased", pytest.param("qwen3", marks=SLOW)])
def test_logits_are_ours_in_every_integer_format(name: str, kind: Integer, group: int | None, tmp_path: Path) -> None:
    """With zero points only where it decodes them while loading: otherwise it makes room for them as if they were not packed."""
    ours, folder = recoded(name, replace(kind, group=group), tmp_path)
    if kind.symmetric:
        assert agree(logits_of(ours, prompt(20)), loaded(folder).logits(prompt(20)))
    theirs = loaded(folder, dequantize=True).logits(prompt(20))
    assert agree(logits_of(in_half_precision(ours, ""), prompt(20)), theirs, 1e-4)


def test_zero_points_as_compressed_tensors_packs_them_are_not_loaded_by_transformers_yet(tmp_path: Path) -> None:
    """When this turns red, the test above and docs/compression.md may say more."""
    _, folder = recoded("llama", Integer(4, symmetric=False), tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(folder)


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.symmetric], ids=str)
def test_with_rounded_activations_they_are_ours_but_for_its_steps(kind: Integer, group: int | None, tmp_path: Path) -> None:
    """It takes max|x| / 127.5 for a step, we and vLLM max|x| / 127: both are as far from the model whose activations are not rounded."""
    ours, folder = recoded("llama", replace(kind, group=group, activations="int8"), tmp_path)
    theirs, mine = loaded(folder).logits(prompt(40)), logits_of(ours, prompt(40))
    for linear in ours.linears().values():
        if isinstance(linear.format, Integer):
            linear.format = replace(linear.format, activations=None)
    plain = logits_of(ours, prompt(40))
    assert (mine - plain).norm() == pytest.approx((theirs - plain).norm().item(), rel=0.3)
    assert 0.001 < (mine - plain).norm() / plain.norm() < 0.03


MIXED = {"*.self_attn.*": "int8", "*.mlp.*": "int4-8", "*.down_proj": "int8-4-a8", "*.v_proj": "dense"}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-window", "qwen2", "qwen3"])
def test_layers_in_different_formats_give_our_logits(name: str, tmp_path: Path) -> None:
    written_by_transformers(name, tmp_path / "hf")
    model = load_checkpoint(tmp_path / "hf")
    head = {} if model.lm_head is None else {"lm_head": "int8"}
    compress(model, CompressConfig(policy=MIXED | head))
    save_checkpoint(model, tmp_path / "out", tmp_path / "hf")
    assert len({linear.format for linear in model.linears().values()}) == 4
    # Rounded activations differ by compressed-tensors' other step: docs/compression.md.
    assert agree(logits_of(model, prompt(20)), loaded(tmp_path / "out").logits(prompt(20)), 0.02)


def mixed_experts(name: str, policy: dict[str, str], root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Our logits, with experts in half precision as transformers unpacks them, and theirs."""
    written_by_transformers(name, root / "hf")
    model = load_checkpoint(root / "hf")
    compress(model, CompressConfig(policy=policy | {"lm_head": "int8"}))
    save_checkpoint(model, root / "out", root / "hf")
    ours = logits_of(in_half_precision(load_checkpoint(root / "out"), "mlp.experts"), prompt(20))
    return ours, loaded(root / "out").logits(prompt(20))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek-direct-query", "mixtral"])
def test_experts_all_in_one_format_beside_attention_in_another_give_our_logits(name: str, tmp_path: Path) -> None:
    assert agree(*mixed_experts(name, {"*.self_attn.*": "int8", "*.mlp.*": "int4-8"}, tmp_path), 1e-4)


@pytest.mark.parametrize(
    "policy",
    [{"*": "int4-8", "*.down_proj": "int8"}, {"*": "int4-8", "*.experts.2.*": "int8"}, {"*": "int4-8", "model.layers.1.mlp.*": "int8"}],
    ids=["down_proj", "one expert", "one layer"],
)
def test_experts_in_several_formats_are_decoded_alike_by_transformers_and_so_wrongly(policy: dict[str, str], tmp_path: Path) -> None:
    """It takes the first group for all experts and says nothing. When this turns red, docs/compression.md may say more."""
    ours, theirs = mixed_experts("qwen3_moe", policy, tmp_path)
    assert (ours - theirs).abs().max() > 0.1
