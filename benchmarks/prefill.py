"""One prefill beside transformers' in the same run: a llama of half a billion random parameters, bf16, 1024 tokens.

    .venv/bin/python benchmarks/prefill.py [--tokens 1024] [--dtype bfloat16] [--repeats 7]

Both compute the logits of the last token. "packed" is the model over one document, as training and scoring run it;
"paged" the engine's way, which fills its cache; transformers fills its cache as well. The floor is the time of the
weight products alone, at the speed that this machine reaches on the largest of them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from lineshaft.base.machine import machine
from lineshaft.engine.cache import PagedCache
from lineshaft.engine.runner import Runner
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.sched.plan import Chunk, Plan
from lineshaft.sched.request import Request, Sampling

SHAPE = {
    "hidden_size": 1280,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
PAGE = 16


def written(folder: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(dtype).save_pretrained(folder)


def packed(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        attend = PackedCausal([0], len(tokens))
        return model.logits(model.hidden(tokens, torch.arange(len(tokens)), attend)[-1:])


def paged(model: Decoder, tokens: torch.Tensor, steady: bool = True) -> torch.Tensor:
    pages = -(-len(tokens) // PAGE)
    cache = PagedCache(model.config, [pages], PAGE, model.model.embed_tokens.weight.dtype)
    request = Request(0, len(tokens), Sampling(max_tokens=1), frozenset(), tokens.tolist(), tables=[list(range(pages))])
    runner = Runner(model, cache, steady, len(tokens), 1, len(tokens))
    return torch.from_numpy(runner.run(Plan([Chunk(request, 0, len(tokens))])))


def theirs(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens[None], use_cache=True, logits_to_keep=1).logits[0]


def products_alone(model: Decoder, tokens: int) -> float:
    """Seconds for the operations of all weight products, at the best speed of the largest one alone, in bf16 or FP32."""
    weight = model.model.layers[0].mlp.gate_proj.weight.detach()
    x = torch.randn(tokens, weight.shape[1])
    pairs = [(x.to(dtype), weight.to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    best = min(timed(partial(torch.nn.functional.linear, *pair)) for _ in range(20) for pair in pairs)
    speed = 2 * tokens * weight.numel() / best
    head = 2 * model.config.vocab_size * model.config.hidden_size
    return ((cost_of(model.config).flops_per_token - head) * tokens + head) / speed


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder), dtype)
        gc.collect()
        ours = load_checkpoint(Path(folder))
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        tokens = torch.randint(0, SHAPE["vocab_size"], (args.tokens,), generator=torch.Generator().manual_seed(1))
        runs = {"packed": lambda: packed(ours, tokens), "paged": lambda: paged(ours, tokens), "transformers": lambda: theirs(peer, tokens)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(args.repeats + 1):  # the first round warms up
            for name, run in runs.items():
                took = timed(run)
                if repeat:
                    seconds[name].append(took)
        told = {name: run().float() for name, run in runs.items()}
        floor = products_alone(ours, args.tokens)
    away = max((told[name] - told["transformers"]).abs().max().item() for name in ("packed", "paged"))
    report(args, seconds, floor, away, cost_of(ours.config).parameters)


def report(args: argparse.Namespace, seconds: dict[str, list[float]], floor: float, away: float, parameters: int) -> None:
    about, middle = machine(), {name: statistics.median(values) for name, values in seconds.items()}
    peer = middle["transformers"]
    for name in ("packed", "paged"):
        mine = middle[name]
        spread = max((max(seconds[which]) - min(seconds[which])) / middle[which] for which in (name, "transformers"))
        print(
            f"prefill {args.tokens} tokens {args.dtype}, {parameters / 1e6:.0f}M llama: lineshaft {name} {mine:.3f} s, "
            f"transformers {version('transformers')} {peer:.3f} s, speed ratio {peer / mine:.2f}, floor {floor:.3f} s "
            f"({floor / mine:.0%} of it reached), spread {spread:.0%}, largest logit difference {away:.2g}, "
            f"torch {about['torch']}, {torch.get_num_threads()} threads, {about['processor']}"
        )


if __name__ == "__main__":
    main()
