"""The references of the ops that work on packed weights (ops/packing.py): plain PyTorch, as those of reference.py, whose letters they use.

X bytes of a packed weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.ops.experts import Feeds
from lineshaft.ops.integers import rounded
from lineshaft.ops.neighbours import Neighbours
from lineshaft.ops.packing import Shape, unpack
from lineshaft.ops.reference import add, silu_mul


def packed_linear(
    x_TI: Tensor,
    packed: Tensor,
    shape: Shape,
    bias_O: Tensor | None,
    whole: bool,
    wide: bool = False,
    input_scale: float = 0.0,
    added_TO: Tensor | None = None,
) -> Tensor:
    """x W^T + b for a weight laid out as ops/packing.py has it. Result [T, O] in the dtype of x, or float32 if `wide`.

    `whole`: activations are rounded to 8 bits first, by a scale a token or by `input_scale` (`integers.rounded`). `added_TO`, in the dtype
    of the result: what the rounded result is added to, as `reference.add` would.
    """
    q_TI, scale_T1 = rounded(x_TI, input_scale) if whole else (x_TI.float(), torch.ones(1, 1))
    product_TO = F.linear(q_TI, unpack(packed, shape).float()) * scale_T1
    made_TO = (product_TO if bias_O is None else product_TO + bias_O.float()).to(torch.float32 if wide else x_TI.dtype)
    return made_TO if added_TO is None else add(added_TO, made_TO)


def packed_linears(x_TI: Tensor, weights: Neighbours) -> tuple[Tensor, ...]:
    """`packed_linear` by each weight. Results [T, O] in the dtype of x."""
    return tuple(
        packed_linear(x_TI, packed, shape, bias_O, weights.whole, False, weights.input_scale)
        for packed, shape, bias_O in zip(weights.packed, weights.shapes, weights.biases, strict=True)
    )


def packed_swiglu(x_TI: Tensor, gate_and_up: Neighbours) -> Tensor:
    """SiLU(gate) * up of the products by two weights of one shape, each rounded to the dtype of x first. Result [T, O] in it."""
    gate_TO, up_TO = packed_linears(x_TI, gate_and_up)
    return silu_mul(gate_TO, up_TO)


def packed_by_head(x_THA: Tensor, packed_HX: Tensor, shape: Shape) -> Tensor:
    """`by_head` for weights [B, A] of each head, packed (ops/packing.py). Result [T, H, B] in the dtype of x."""
    weight_HBA = torch.stack([unpack(packed, shape) for packed in packed_HX])
    return torch.einsum("tha,hba->thb", x_THA.float(), weight_HBA.float()).to(x_THA.dtype)


def experts(x_TI: Tensor, weight_TK: Tensor, expert_TK: Tensor, feeds: Feeds) -> Tensor:
    """Each token through its K experts, their results weighted and added up. Result [T, I] in the dtype of x."""
    y_TKI = x_TI.new_zeros(*expert_TK.shape, feeds.down.outputs)
    for expert in sorted(set(expert_TK.flatten().tolist())):
        rows, places = (expert_TK == expert).nonzero(as_tuple=True)
        gate, up = (packed_linear(x_TI[rows], of[expert], feeds.wide, None, feeds.wide_whole) for of in (feeds.gates, feeds.ups))
        y_TKI[rows, places] = packed_linear(silu_mul(gate, up), feeds.downs[expert], feeds.down, None, feeds.down_whole)
    return (y_TKI * weight_TK.to(x_TI.dtype)[:, :, None]).sum(1)
