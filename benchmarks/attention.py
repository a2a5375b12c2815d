"""What a sparse reach saves: the formula, the pairs counted, and the time, against causal attention of the same shape.

    .venv/bin/python benchmarks/attention.py [--threads 1] [--repeats 3] [--heads 8] [--kv-heads 2] [--width 64]

Prefill: one document of n tokens, FP32. Decode: one token over a paged cache of n tokens. Then the indexer's decode, and
the length from which a claim of the saving holds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lineshaft.base.machine import machine
from lineshaft.ops import table as ops
from lineshaft.ops.reach import Blocks, Causal, Reach, Window

PREFILL: list[tuple[Reach, list[int], float]] = [
    (Window(window=2048), [2048, 4096, 8192, 9093, 16384], 0.60),
    (Window(window=128), [128, 184, 256, 512, 1024, 2048], 0.30),
    (Window(window=2044, global_tokens=4), [4096, 9093], 0.60),
    (Blocks(block=64, local_blocks=8, stride=8), [2048, 4096, 8192, 16384], 0.60),
]
"""Reach, lengths, and the saving whose first length is asked for."""
DECODE = [1024, 4096, 16384, 65536]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def timed(works: list[Callable[[], object]], repeats: int) -> list[tuple[float, float]]:
    """(median seconds, spread) of each, taken in turn; short ones are done several times a turn. The first turn warms up."""
    times = [max(1, int(0.02 / seconds(work))) for work in works]
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, count, found in zip(works, times, taken, strict=True):
            found.append(seconds(lambda work=work, count=count: [work() for _ in range(count)]) / count)
    return [(statistics.median(found), (max(found) - min(found)) / statistics.median(found)) for found in taken]


def formula(window: int, tokens: int) -> float:
    """1 - (nw - w^2/2) / (n^2/2), as it is usually written; 0 up to the window."""
    return 1 - (tokens * window - window**2 / 2) / (tokens**2 / 2) if tokens > window else 0.0


def named(reach: Reach) -> str:
    """window(window=2048, global_tokens=0)"""
    options = ", ".join(f"{name}={value}" for name, value in reach if name != "kind")
    return f"{reach.kind}({options})"


def counted(reach: Reach, tokens: int) -> float:
    return 1 - reach.pairs(tokens) / Causal().pairs(tokens)


def first_length(saving: Callable[[int], float], claim: float) -> int:
    """The shortest document that saves so much; savings grow with the length, but for the steps of blocks."""
    low, high = 1, 2
    while saving(high) < claim:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saving(middle) >= claim else (middle, high)
    return high


def crossing(lengths: list[int], savings: list[float], claim: float) -> str:
    """Where the measured saving passes the claim, between two lengths in a straight line."""
    for (n, one), (m, two) in pairwise(zip(lengths, savings, strict=True)):
        if one < claim <= two:
            return f"about n={n + (claim - one) / (two - one) * (m - n):.0f}"
    return f"from n={lengths[0]} on" if savings[0] >= claim else f"not up to n={lengths[-1]}"


def prefill(reach: Reach, lengths: list[int], claim: float, shape: tuple[int, int, int], repeats: int, about: str) -> None:
    savings, (heads, kv, width) = [], shape
    for tokens in lengths:
        q, k, v = (torch.randn(tokens, count, width) for count in (heads, kv, kv))
        with torch.inference_mode():
            runs = [lambda kind=kind: ops.reach_gqa(q, k, v, 0.1, kind) for kind in (Causal(), reach)]  # noqa: B023 - used in this turn
            (causal, wide), (sparse, narrow) = timed(runs, repeats)
        savings.append(1 - sparse / causal)
        usual = f"formula {formula(reach.window, tokens):.1%}, " if isinstance(reach, Window) and not reach.global_tokens else ""
        flops = 4 * heads * width * reach.pairs(tokens)
        print(
            f"prefill n={tokens} {named(reach)} saves: {usual}counted {counted(reach, tokens):.1%} ({flops / 1e9:.2f} GFLOP), "
            f"measured {savings[-1]:.1%} ({causal * 1e3:.2f} to {sparse * 1e3:.2f} ms, spread {max(wide, narrow):.0%}), {about}"
        )
    if usual:
        usual = f"by formula from n={first_length(lambda n: formula(reach.window, n), claim)}, "
    from_here = first_length(lambda n: counted(reach, n), claim)
    print(f"{claim:.0%} saved {named(reach)}: {usual}counted from n={from_here}, measured {crossing(lengths, savings, claim)}, {about}")


def decode(shape: tuple[int, int, int], repeats: int, about: str) -> None:
    """One token over a paged cache, and over latents of DeepSeek-V3's width with and without a choice of 2048."""
    kinds: list[Reach] = [Causal(), Window(window=2048), Window(window=2044, global_tokens=4), Blocks(block=64, local_blocks=8, stride=8)]
    heads, kv, width = shape
    for context in DECODE:
        pages = torch.randperm(context // 16)
        keys, values = (torch.randn(context // 16, 16, kv, width) for _ in range(2))
        q = torch.randn(1, heads, width)
        with torch.inference_mode():
            found = timed([lambda kind=kind: ops.paged_gqa(q, keys, values, pages, context - 1, 0.1, kind) for kind in kinds], repeats)  # noqa: B023
        told = ", ".join(f"{named(kind)} {median * 1e3:.3f} ms" for kind, (median, _) in zip(kinds, found, strict=True))
        print(f"decode n={context}: {told}, spread {max(spread for _, spread in found):.0%}, {about}")
    for context in DECODE:
        pages, entries = torch.randperm(context // 16), torch.randn(context // 16, 16, 576)
        q, q_rope = torch.randn(1, 16, 512), torch.randn(1, 16, 64)
        chosen = torch.zeros(1, context, dtype=torch.bool)
        chosen[0, torch.randperm(context)[:2048]] = True
        with torch.inference_mode():
            found = timed([lambda: _all(q, q_rope, entries, pages), lambda: _some(q, q_rope, entries, pages, chosen)], repeats)  # noqa: B023
        (whole, wide), (some, narrow) = found
        print(
            f"decode n={context}, latents, 16 heads: all {whole * 1e3:.3f} ms, 2048 chosen {some * 1e3:.3f} ms, "
            f"ratio {whole / some:.2f}, spread {max(wide, narrow):.0%}, {about}"
        )


def _all(q: Tensor, q_rope: Tensor, entries: Tensor, pages: Tensor) -> Tensor:
    return ops.paged_mla(q, q_rope, entries, pages, len(pages) * 16 - 1, 0.1, Causal())


def _some(q: Tensor, q_rope: Tensor, entries: Tensor, pages: Tensor, chosen: Tensor) -> Tensor:
    return ops.paged_chosen_mla(q, q_rope, entries, pages, chosen, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape, on = (args.heads, args.kv_heads, args.width), machine()
    about = f"{args.heads}/{args.kv_heads} heads of {args.width}, FP32, torch {on['torch']}, {args.threads} threads, {on['processor']}"
    for reach, lengths, claim in PREFILL:
        prefill(reach, lengths, claim, shape, args.repeats, about)
    decode(shape, args.repeats, about)


if __name__ == "__main__":
    main()
