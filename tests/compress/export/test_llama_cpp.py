"""GGUF files in llama.cpp itself: its logits are ours, its tokens are ours.

`pip install llama-cpp-python` compiles it, for half an hour on one core, so these tests are skipped where it is missing.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_toys import CUTS, SENTENCES, SPECIAL, VISIBLE, compressed, with_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import logits_of, prompt

from lineshaft.compress.export.exporting import export
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import DENSE, Integer
from lineshaft.ops.integers import Integers
from lineshaft.text.tokenizer import Tokenizer

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it has to be compiled, so nobody must")

Source = Callable[..., Path]
BLOCK = 32

EXACT = [
    *("llama", "llama-mha", "llama-one-key-head", "llama-biased", "llama-tied", "llama-wide-heads", "llama-theta", "llama-linear"),
    *("llama-llama3", "llama-yarn", "llama-yarn-factor-of-its-own", "llama-yarn-two-mscales", "mistral", "broad-llama"),
    *("mixtral", "mixtral-one-expert-tied", "mixtral-wide-heads"),
    *("qwen2", "qwen2-tied", "qwen2-yarn", "qwen3", "qwen3-tied", "qwen3-yarn", "qwen3_moe"),
    *("deepseek", "deepseek-direct-query", "deepseek-groups", "deepseek-one-group-of-four", "deepseek-no-dense-layer"),
    *("deepseek-all-dense", "deepseek-two-shared", "deepseek-weights-as-they-are", "deepseek-everything"),
    *("grid-yarn-qlora-4groups-1dense", "grid-yarn-direct-1groups-0dense", "deepseek-half-split", "deepseek-half-split-yarn"),
    *("deepseek_v2", "deepseek_v2-direct-query", "deepseek_v2-one-group", "deepseek_v2-no-dense-layer", "deepseek_v2-yarn"),
]


def theirs(path: Path, *texts: list[int]) -> list[np.ndarray]:
    """llama.cpp's logits [T, V] of each text, its cache in float32."""
    sizes = {"n_ctx": 64, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1}
    model = llama_cpp.Llama(str(path), **sizes, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
    found = []
    for text in texts:
        model.reset()
        model.eval(text)
        found.append(np.array(model.scores[: len(text)]))
    model.close()
    return found


def apart(ours: Tensor, other: np.ndarray) -> float:
    """How far logits lie apart at most, as a part of the largest one."""
    return float(np.abs(ours.float().numpy() - other).max() / ours.abs().max())


@pytest.mark.parametrize("name", EXACT)
def test_logits_in_float32_are_ours(name: str, source: Source, tmp_path: Path) -> None:
    export(source(name), tmp_path / "m.gguf", "gguf", tokenizer="none")
    text = prompt(40)
    assert apart(logits_of(load_checkpoint(source(name)), text), *theirs(tmp_path / "m.gguf", text)) < 5e-6


# -- coded weights: llama.cpp rounds what meets them to 8 bits in blocks, which is done here to our model as well


def in_blocks(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers [T, B, 32], scale [T, B, 1] before it is rounded to FP16), as ggml's quantize_row_q8_0 has them."""
    x_TBI = x_TI.reshape(len(x_TI), -1, BLOCK)
    largest = x_TBI.abs().amax(-1, keepdim=True)
    return (x_TBI * torch.where(largest == 0, 0.0, 127 / largest)).round(), largest / 127


def with_offsets(x_TI: Tensor, weight: Integers) -> Tensor:
    """A product with Q4_1 blocks, as ggml's vec_dot_q4_1_q8_1 works it out: offsets meet the FP16 sum of a block."""
    outputs, inputs = weight.codes_OI.shape
    each = inputs // BLOCK // weight.scale_OG.shape[1]
    scale_OB = weight.scale_OG.repeat_interleave(each, 1)
    offset_OB = (-weight.zero_OG.float() * weight.scale_OG).half().float().repeat_interleave(each, 1)
    whole_TBI, step_TB1 = in_blocks(x_TI)
    sums_TOB = torch.einsum("tbi,obi->tob", whole_TBI, weight.codes_OI.float().view(outputs, -1, BLOCK))
    step_T1B = step_TB1.half().float().transpose(1, 2)
    all_TB = (step_TB1[..., 0] * whole_TBI.sum(-1)).half().float()
    return (sums_TOB * scale_OB * step_T1B).sum(-1) + all_TB @ offset_OB.T


def as_llama_cpp_rounds(model: Decoder) -> Decoder:
    """The model with what meets coded or BF16 weights rounded as ggml rounds it."""
    for linear in model.linears().values():
        fmt, bias = linear.format, 0 if linear.bias is None else linear.bias.float()
        weight = linear.dense_weight(torch.float32)
        if isinstance(fmt, Integer) and not fmt.symmetric:
            codes = fmt.integers(linear.tensors())
            linear.forward = lambda x, codes=codes, bias=bias: with_offsets(x, codes) + bias
        elif fmt != DENSE:
            linear.forward = lambda x, weight=weight, bias=bias: rounded(x) @ weight.T + bias
        elif linear.weight.dtype == torch.bfloat16:
            linear.forward = lambda x, weight=weight, bias=bias: x.bfloat16().float() @ weight.T + bias
    return model


def rounded(x_TI: Tensor) -> Tensor:
    whole, step = in_blocks(x_TI)
    return (whole * step.half().float()).view(x_TI.shape)


def check_texts(folder: Path, tmp_path: Path) -> None:
    """Of ten short texts at least half have llama.cpp's logits to the last digits; what is wrong in a file is so in all of them.

    In the others some number lies at the border of two codes, and falls on either side by the order of a sum.
    """
    export(folder, tmp_path / "m.gguf", "gguf", tokenizer="none")
    model = as_llama_cpp_rounds(load_checkpoint(folder))
    for name, part in [*model.named_parameters()]:
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), Linear):
            part.data = part.data.float()
    texts = [prompt(6, seed) for seed in range(10)]
    far = [apart(logits_of(model, text), other) for text, other in zip(texts, theirs(tmp_path / "m.gguf", *texts), strict=True)]
    assert sum(one < 1e-6 for one in far) >= 5, far


@pytest.mark.parametrize("form", ["bf16", "int8", "int8-32", "int4", "int4-32", "int4-32-zeros"])
@pytest.mark.parametrize("name", ["wide-llama", "wide-mixtral", "wide-qwen2", "wide-qwen3_moe"])
def test_logits_of_other_kinds_are_ours_rounded_alike(name: str, form: str, source: Source, tmp_path: Path) -> None:
    check_texts(source(name, form), tmp_path)


@pytest.mark.parametrize("form", ["int8", "int4-32", "int4-32-zeros"])
@pytest.mark.parametrize("name", ["wide-deepseek", "wide-deepseek-half-split", "wide-deepseek_v2"])
def test_so_they_are_with_latent_attention(name: str, form: str, source: Source, tmp_path: Path) -> None:
    """But for kv_b_proj, which llama.cpp multiplies by in another order, so it is left dense here; its bits are proved elsewhere."""
    check_texts(compressed(source(name), tmp_path / "hf", form, dense="*.kv_b_proj"), tmp_path)


# -- tokens


@pytest.fixture(scope="module")
def speakers(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Tokenizer, Any]]]:
    """speakers(cut): our tokenizer and llama.cpp's of the same exported checkpoint."""
    made: dict[str, tuple[Tokenizer, Any]] = {}

    def get(cut: str) -> tuple[Tokenizer, Any]:
        if cut not in made:
            root = tmp_path_factory.mktemp(cut)
            folder = with_tokenizer(shutil.copytree(source("spoken-llama"), root / "hf"), cut)
            export(folder, root / "m.gguf", "gguf")
            made[cut] = Tokenizer.load(folder), llama_cpp.Llama(str(root / "m.gguf"), vocab_only=True, verbose=False)
        return made[cut]

    yield get
    for _, model in made.values():
        model.close()


NAMED = sorted(CUTS.keys() - {"ours"})


@pytest.mark.parametrize("cut", NAMED)
def test_tokens_are_ours(cut: str, speakers: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    mine, other = speakers(cut)
    for text in (*SENTENCES, *(f"{SPECIAL[0]}{text}{VISIBLE[0]} {SPECIAL[1]}" for text in SENTENCES)):
        text = unicodedata.normalize("NFC", text)
        assert other.tokenize(text.encode(), add_bos=False, special=False) == mine.encode(text), text
        assert other.tokenize(text.encode(), add_bos=False, special=True) == mine.encode_templated(text), text


@pytest.mark.parametrize("cut", NAMED)
def test_tokens_of_any_text_are_ours(cut: str, speakers: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    mine, other = speakers(cut)
    letters = st.sampled_from("aZé'sdtm 19\n\r\t.,!?-_{}中文字あア한。，！Ωж🎉") | st.characters(
        max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn")
    )

    @given(st.text(letters, max_size=30))
    @settings(max_examples=150)
    def check(text: str) -> None:
        text = unicodedata.normalize("NFC", text)
        assert other.tokenize(text.encode(), add_bos=False, special=False) == mine.encode(text)

    check()


def test_text_of_tokens_is_ours_and_ends_are_known(speakers: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    mine, other = speakers("deepseek-v3")
    for text in SENTENCES:
        assert other.detokenize(mine.encode(text)).decode() == text
    assert (other.token_bos(), other.token_eos()) == (0, 2)
