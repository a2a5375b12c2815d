"""Run by a Python that has vLLM, not by ours: `python vllm_child.py ASKED ANSWERED`, two JSON files.

Asked: `folder`, `prompts` (rows of token ids), `count` (tokens to answer), `vocabulary`, and `float32`: compute in float32 whatever it
takes. Answered: `dtype`, in which it computed, and for each prompt `tokens`, the greedy answer, and `chances`, the log-probabilities of
all tokens after each token.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# One process; no telemetry, no downloads; 1 GiB for keys and values.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from vllm import LLM, SamplingParams, _custom_ops
from vllm.platforms import current_platform


def stand_in(input, q_weight, scales, zeros, bias, pack_factor, isa_hint):
    """The product of 4-bit weights as vLLM lays them out: blocks of 16 outputs, two words an input, lowest bits first."""
    places = torch.arange(0, 32, 4, dtype=torch.int32)
    inputs = input.shape[1]
    repeats = inputs // len(scales)
    codes_IO = (q_weight.view(-1, inputs, 2, 1) >> places & 15).flatten(2).permute(1, 0, 2).flatten(1)
    zeros_IO = 8 if zeros is None else (zeros[:, :, None] >> places & 15).flatten(1).repeat_interleave(repeats, 0)
    product_TO = input.float() @ ((codes_IO - zeros_IO) * scales.float().repeat_interleave(repeats, 0))
    return (product_TO if bias is None else product_TO + bias.float()).to(input.dtype)


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    current_platform.import_kernels()
    theirs = hasattr(torch.ops._C, "cpu_gemm_wna16") and not asked["float32"]
    if not theirs:  # its library for AVX2 has none, and the others' takes no float32
        _custom_ops.cpu_gemm_wna16 = stand_in
    dtype = "float16" if theirs else "float32"  # FP16 holds our scales exactly
    llm = LLM(
        model=asked["folder"], dtype=dtype, max_model_len=128, max_num_seqs=4, enable_prefix_caching=False, skip_tokenizer_init=True,
        enforce_eager=True, max_logprobs=-1, disable_log_stats=True,
    )  # fmt: skip
    wanted = SamplingParams(temperature=0, max_tokens=asked["count"], ignore_eos=True, detokenize=False, logprobs=-1, prompt_logprobs=-1)
    answers = []
    for each in llm.generate([{"prompt_token_ids": row} for row in asked["prompts"]], wanted, use_tqdm=False):
        rows = [*each.prompt_logprobs[1:], *each.outputs[0].logprobs]
        chances = [[row[token].logprob for token in range(asked["vocabulary"])] for row in rows]
        answers.append({"tokens": list(each.outputs[0].token_ids), "chances": chances})
    Path(sys.argv[2]).write_text(json.dumps({"dtype": dtype, "answers": answers}))


if __name__ == "__main__":
    main()
