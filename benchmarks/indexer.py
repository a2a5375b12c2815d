"""DeepSeek-V3.2's indexer in the native kernels beside its choice by PyTorch, in turns: one stream and a prompt.

    .venv/bin/python benchmarks/indexer.py [--contexts 300 2000] [--rounds 3] [--layers 4]

A random model of V3.2's shape, bf16: hidden 1024, 16 heads, 16 index heads of 128 channels, 512 tokens chosen, two of 16 experts. "PyTorch"
is the engine as it was before: choice and attention by PyTorch, op by op, all else native. Milliseconds a token of one stream, seconds to the first token, medians;
ratios above 1: native is faster. The floor of a token is its weights and what its attention reads, at the rate at which this machine reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from unittest import mock

import torch
from workload import read_rate

from lineshaft.base.machine import machine
from lineshaft.engine import runner
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.config import Indexer, LatentAttention, MixtureOfExperts, ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.ops.isa import describe
from lineshaft.sched.request import Ask, Emitted, Sampling

TOP, ANSWER = 512, 24


def model_of(layers: int) -> Decoder:
    """Random, in bf16."""
    index = Indexer(num_heads=16, head_dim=128, top_k=TOP)
    widths = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
    attention = LatentAttention(num_attention_heads=16, q_lora_rank=512, kv_lora_rank=512, indexer=index, **widths)
    experts = MixtureOfExperts(n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=512, first_k_dense_replace=1)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "max_position_embeddings": 8192, "vocab_size": 32000}
    model = Decoder(ModelConfig(family="deepseek_v32", num_hidden_layers=layers, attention=attention, moe=experts, **sizes))
    model.initialise(1)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def answered(engine: Engine, context: int, number: int) -> tuple[float, float]:
    """Seconds to the first token, and the median of those between tokens."""
    tokens = [7 + (place * 13 + number + 100 * context) % 31000 for place in range(context)]  # no beginning is in the cache
    engine.submit(Ask(tokens, Sampling(max_tokens=ANSWER, temperature=0, ignore_eos=True)))
    times = [time.perf_counter()]
    while not engine.idle:
        times += [time.perf_counter() for event in engine.step() if isinstance(event, Emitted)]
    return times[1] - times[0], statistics.median(after - before for before, after in pairwise(times[1:]))


def floor_of(config: ModelConfig, context: int, rate: float) -> float:
    """Seconds: active weights but the embedding, index keys of the context, latents of what is chosen."""
    a = config.attention
    assert isinstance(a, LatentAttention)
    assert a.indexer is not None
    entries = context * a.indexer.head_dim + min(context, TOP) * (a.kv_lora_rank + a.qk_rope_head_dim)
    weights = cost_of(config).active_parameters - config.vocab_size * config.hidden_size
    return 2 * (weights + config.num_hidden_layers * entries) / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[300, 2000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    print(json.dumps(machine()), describe(), sep="\n", flush=True)
    model, rate = model_of(given.layers), read_rate()
    native = Engine(model, EngineConfig())
    with mock.patch.object(runner, "obstacle", lambda _config: "for comparison"):
        engines = {"native": native, "PyTorch": Engine(model, EngineConfig())}
    for context in given.contexts:
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for number in range(given.rounds + 1):
            for name, engine in engines.items():
                seen[name].append(answered(engine, context, 1 + number))
        for place, (what, unit, scale) in enumerate((("first token", "s", 1.0), ("one stream", "ms a token", 1e3))):
            ours, theirs = ([scale * each[place] for each in seen[name][1:]] for name in engines)  # the first is a warm-up
            spreads = ", ".join(f"{max(each) - min(each):.3g}" for each in (ours, theirs))
            mine, other = statistics.median(ours), statistics.median(theirs)
            floor = f", floor {1e3 * floor_of(model.config, context, rate):.3g} at {rate / 1e9:.1f} GB/s" if place else ""
            figures = f"{mine:.4g} {unit}, PyTorch {other:.4g}, ratio {other / mine:.2f} (spreads {spreads})"
            print(f"  {context} tokens, {what}: {figures}{floor}", flush=True)


if __name__ == "__main__":
    main()
