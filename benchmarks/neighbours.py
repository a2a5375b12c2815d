"""Neighbouring products as one op beside the same one after another: milliseconds of layers of a 0.53 G llama, without attention.

    .venv/bin/python benchmarks/neighbours.py [--layers 12] [--repeats 9] [--isa avx512] [--tokens 1 16 256]

As one: q, k and v; gate and up with SwiGLU; output and down with the residual. Both ways are recorded as steps and take turns;
medians, and the spread of ours. Results have the same bits, which is checked.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from kernels import Packed, asked_for, packed, seconds
from torch import Tensor

from lineshaft.base.machine import machine
from lineshaft.ops import native, native_linear
from lineshaft.ops.neighbours import Neighbours
from lineshaft.ops.recording import Recorded

HIDDEN, KEYS, WIDTH = 1280, 640, 3584
KINDS = ("bf16", "int8, activations 8 bits", "int4 of 128, activations 8 bits")
Layer = dict[str, Packed]


def layer(kind: str) -> Layer:
    outputs = {"q": HIDDEN, "k": KEYS, "v": KEYS, "o": HIDDEN, "gate": WIDTH, "up": WIDTH, "down": HIDDEN}
    return {name: packed(kind, count, WIDTH if name == "down" else HIDDEN) for name, count in outputs.items()}


def apart(x: Tensor, layers: list[Layer], whole: bool) -> Tensor:
    """k and v are worked out and left; attention is not what this measures."""
    for weights in layers:
        q, *_ = (native_linear.packed_linear(x, weights[name][1], weights[name][0], None, whole) for name in ("q", "k", "v"))
        x = native.add(x, native_linear.packed_linear(q, weights["o"][1], weights["o"][0], None, whole))
        gate, up = (native_linear.packed_linear(x, weights[name][1], weights[name][0], None, whole) for name in ("gate", "up"))
        x = native.add(x, native_linear.packed_linear(native.silu_mul(gate, up), weights["down"][1], weights["down"][0], None, whole))
    return x


def together(x: Tensor, layers: list[Layer], whole: bool) -> Tensor:
    for weights in layers:
        q, *_ = native_linear.packed_linears(x, beside(weights, ("q", "k", "v"), whole))
        x = native_linear.packed_linear(q, weights["o"][1], weights["o"][0], None, whole, added_TO=x)
        middle = native_linear.packed_swiglu(x, beside(weights, ("gate", "up"), whole))
        x = native_linear.packed_linear(middle, weights["down"][1], weights["down"][0], None, whole, added_TO=x)
    return x


def beside(weights: Layer, names: tuple[str, ...], whole: bool) -> Neighbours:
    shapes, tensors = zip(*(weights[name] for name in names), strict=True)
    return Neighbours(tensors, shapes, (None,) * len(names), whole)


def main() -> None:
    asked, found = asked_for(__doc__, 12, 9, [1, 4, 16, 64, 256, 1024])
    for kind in KINDS:
        layers = [layer(kind) for _ in range(asked.layers)]
        for tokens in asked.tokens:
            print(line(kind, layers, tokens, asked.repeats), flush=True)
    print(f"{found.chosen()}, {found.threads()} threads, torch {torch.__version__}, {machine()['processor']}")


def line(kind: str, layers: list[Layer], tokens: int, repeats: int) -> str:
    x, whole = (torch.randn(tokens, HIDDEN) / 100).bfloat16(), "activations" in kind
    steps = [Recorded(lambda way=way: way(x, layers, whole)) for way in (together, apart)]
    runs: list[Callable[[], object]] = [lambda step=step: step.run(tokens) for step in steps]
    ours, theirs = seconds(runs, repeats)
    same = torch.equal(steps[0].output.view(torch.int16), steps[1].output.view(torch.int16))
    middle, other = statistics.median(ours), statistics.median(theirs)
    return (
        f"{kind}, {tokens} tokens: {1e3 * middle:.2f} ms in {len(steps[0])} calls, apart {1e3 * other:.2f} in {len(steps[1])}: "
        f"ratio {middle / other:.3f}, spread {(max(ours) - min(ours)) / middle:.0%}, {'same bits' if same else 'DIFFERENT BITS'}"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
