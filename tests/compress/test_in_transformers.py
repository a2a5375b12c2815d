"""A user must be able to leave: what we compress, transformers with compressed-tensors loads and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from toys import Theirs, agree, logits_of, prompt, written_by_transformers

from lineshaft.compress.stage import CompressConfig, compress
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import DENSE

FORMS = [None, 4]
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
