"""Native products beside their ceilings and PyTorch's bf16: GB/s of weights read and GFLOP/s, for several numbers of tokens.

    .venv/bin/python benchmarks/kernels.py [--layers 24] [--repeats 7] [--isa avx512]

The weights are those of the layers of a 0.53 G llama, several layers, so that no cache holds them. Ours are recorded as a step, as
the engine runs them, and take turns with PyTorch's; medians, and the spread of ours. The memory's ceiling is one pass of PyTorch's
sum over 1 GB, taken in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.machine import machine
from lineshaft.ops import native_linear, packing
from lineshaft.ops.integers import Integers
from lineshaft.ops.isa import library
from lineshaft.ops.packing import Shape
from lineshaft.ops.recording import Recorded

SHAPES = ((2560, 1280), (1280, 1280), (7168, 1280), (1280, 3584))
"""Outputs and inputs of q, k and v together, o, gate and up together, down."""
KINDS = ("bf16", "int8, activations 8 bits", "int8", "int4 of 128, activations 8 bits", "int4 of 128", "fp8 of 128")
Packed = tuple[Shape, Tensor]


def packed(kind: str, outputs: int, inputs: int) -> Packed:
    if kind == "bf16":
        made = packing.pack_dense(torch.randn(outputs, inputs).bfloat16())
    elif kind.startswith("fp8"):
        blocks = torch.rand(-(-outputs // 128), inputs // 128)
        made = packing.pack_fp8(torch.randn(outputs, inputs).to(torch.float8_e4m3fn), blocks, (128, 128))
    else:
        bits, group = (8, inputs) if kind.startswith("int8") else (4, 128)
        codes = torch.randint(2**bits, (outputs, inputs), dtype=torch.uint8)
        scale = torch.rand(outputs, inputs // group) / 2**bits
        made = packing.pack_coded(Integers(codes, scale, torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)), bits)
    assert made is not None
    return made


def seconds(runs: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Of each run, taken in turns."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, own in zip(runs, taken, strict=True):
            began = time.perf_counter()
            run()
            own.append(time.perf_counter() - began)
    return [own[1:] for own in taken]  # the first of each warms up


def asked_for(about: str, layers: int, repeats: int, tokens: list[int]) -> tuple[argparse.Namespace, Any]:
    """Options, with these defaults, and the library, set to the instruction set that was named."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens)
    parser.add_argument("--isa")
    asked, found = parser.parse_args(), library()
    if found is None:
        parser.exit(1, "no native kernels here: lineshaft kernels tells why\n")
    if asked.isa:
        found.choose(asked.isa)
    return asked, found


def main() -> None:
    asked, found = asked_for(__doc__, 24, 7, [1, 4, 16, 64, 256])
    big = torch.ones(1 << 28)
    (reads,) = seconds([big.sum], 5)
    print(f"memory, one pass of PyTorch's sum: {big.nbytes / min(reads) / 1e9:.1f} GB/s")
    dense = [torch.randn(shape).bfloat16() for _ in range(asked.layers) for shape in SHAPES]
    for kind in KINDS:
        weights = [packed(kind, *shape) for _ in range(asked.layers) for shape in SHAPES]
        for tokens in asked.tokens:
            print(line(kind, weights, dense, tokens, asked.repeats), flush=True)
    print(f"{found.chosen()}, {found.threads()} threads, torch {torch.__version__}, {machine()['processor']}")


def line(kind: str, weights: list[Packed], dense: list[Tensor], tokens: int, repeats: int) -> str:
    x = {inputs: torch.randn(tokens, inputs).bfloat16() for _, inputs in SHAPES}

    def products() -> Tensor:
        for shape, weight in weights:
            out = native_linear.packed_linear(x[shape.inputs], weight, shape, None, "activations" in kind)
        return out

    recorded = Recorded(products)

    def theirs() -> None:
        for weight in dense:
            F.linear(x[weight.shape[1]], weight)

    own, other = seconds([lambda: recorded.run(tokens), theirs], repeats if tokens < 64 else 3)
    middle, size = statistics.median(own), sum(len(weight) for _, weight in weights)
    work = 2 * tokens * sum(shape.inputs * shape.outputs for shape, _ in weights)
    spread = (max(own) - min(own)) / middle
    return (
        f"{kind}, {tokens} tokens: {1e3 * middle:.1f} ms, {size / middle / 1e9:.1f} GB/s, {work / middle / 1e9:.0f} GFLOP/s, "
        f"PyTorch's bf16 takes {statistics.median(other) / middle:.2f} times as long, spread {spread:.0%}"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
