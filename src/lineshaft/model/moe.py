"""Mixture of experts: a router, the experts it chooses, and those that every token uses.

Sigmoid routers with a balancing bias are DeepSeek-V3's (arXiv 2412.19437, section 2.1.2); softmax routers are those of
Mixtral (arXiv 2401.04088, section 2.1), Qwen-MoE and DeepSeek-V2 (arXiv 2405.04434, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lineshaft.model.config import MixtureOfExperts
from lineshaft.model.ffn import FeedForward
from lineshaft.model.junction import Junction, Port
from lineshaft.model.scorer import Scorer
from lineshaft.model.units import Place, Units
from lineshaft.ops import table as ops
from lineshaft.ops.experts import Feeds, Rule
from lineshaft.ops.packed import Packed


class Router(Scorer):
    """Chooses experts for each token and weights them."""

    __call__: Callable[..., tuple[Tensor, Tensor]]
    e_score_correction_bias: Tensor | None
    load: Tensor

    def __init__(self, hidden: int, moe: MixtureOfExperts) -> None:
        super().__init__(hidden, moe.n_routed_experts)
        self.moe = moe
        groups = moe.n_group, moe.topk_group
        self.rule = Rule(moe.num_experts_per_tok, moe.scoring_func == "sigmoid", *groups, moe.norm_topk_prob, moe.routed_scaling_factor)
        # Steers the choice only, never the weights; moved by `rebalance`, not by gradients.
        bias = torch.zeros(moe.n_routed_experts) if moe.scoring_func == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)
        # Tokens sent to each expert since the last `rebalance`; counted while training.
        self.register_buffer("load", torch.zeros(moe.n_routed_experts), persistent=False)

    def forward(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, top] in float32 and experts [T, top] of each token."""
        with torch.autocast(x_TI.device.type, enabled=False):
            weight_TK, expert_TK = ops.route(self._logits(x_TI), self.e_score_correction_bias, self.rule)
        if self.training:
            self.load += torch.bincount(expert_TK.flatten(), minlength=len(self.load))
        return weight_TK, expert_TK

    def _logits(self, x_TI: Tensor) -> Tensor:
        """[T, E], always in float32: a choice hangs on it."""
        if self.packed is None:
            return ops.linear(x_TI.float(), self.weight.float(), None)
        return ops.packed_linear(ops.widen(x_TI), self.packed[1], self.packed[0], None, False)

    def pack(self) -> None:
        """See Scorer; the bias meets float32 then."""
        super().pack()
        if self.packed is not None and self.e_score_correction_bias is not None:
            self.e_score_correction_bias = self.e_score_correction_bias.float()

    def rebalance(self, speed: float) -> None:
        """Move the bias, where there is one, by `speed` towards equal load and forget the counts (section 2.1.2)."""
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias += speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class ExpertBlock(nn.Module):
    """Routed experts, shared ones, and those added later."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden: int, moe: MixtureOfExperts) -> None:
        super().__init__()
        width = moe.moe_intermediate_size
        self.gate = Router(hidden, moe)
        self.experts = nn.ModuleList(FeedForward(hidden, width) for _ in range(moe.n_routed_experts))
        self.shared_experts = FeedForward(hidden, width * moe.n_shared_experts) if moe.n_shared_experts else None
        gated = moe.shared_expert_intermediate_size
        self.shared_expert = FeedForward(hidden, gated) if gated else None
        self.shared_expert_gate = OutputGate(hidden) if gated else None
        self.added_experts = nn.ModuleList(AddedExpert(hidden, width) for _ in range(moe.n_added_experts))

    def forward(self, x_TI: Tensor, onto_TI: Tensor | None = None) -> Tensor:
        """[T, hidden] to [T, hidden]; `onto_TI`: what it is added to."""
        weight_TK, expert_TK = self.gate(x_TI)
        feeds = self._feeds()
        if feeds is None:
            out_TI = self._routed(x_TI, weight_TK.to(x_TI.dtype), expert_TK)
        else:
            out_TI = ops.experts(x_TI, weight_TK, expert_TK, feeds)
        if self.shared_experts is not None:
            out_TI = self.shared_experts(x_TI, out_TI)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out_TI = ops.add(out_TI, ops.scaled(self.shared_expert(x_TI), ops.sigmoid(self.shared_expert_gate(x_TI))))
        for added in self.added_experts:
            out_TI = ops.add(out_TI, added(x_TI))
        return out_TI if onto_TI is None else ops.add(onto_TI, out_TI)

    def _feeds(self) -> Feeds | None:
        """The experts as one op takes them: packed, of one shape, without biases. None where they are not so."""
        first: Any = self.experts[0]
        wide, down = first.gate_proj.format, first.down_proj.format
        if not (isinstance(wide, Packed) and isinstance(down, Packed)) or wide.input_scale or down.input_scale:
            return None  # the op finds the scale of each token
        gates, ups, downs = ([getattr(expert, name) for expert in self.experts] for name in ("gate_proj", "up_proj", "down_proj"))
        alike = all(linear.format == wide for linear in gates + ups) and all(linear.format == down for linear in downs)
        if not alike or any(linear.bias is not None for linear in gates + ups + downs):
            return None
        packed_gates, packed_ups, packed_downs = (tuple(linear.packed for linear in linears) for linears in (gates, ups, downs))
        return Feeds(packed_gates, packed_ups, packed_downs, wide.shape, down.shape, wide.whole, down.whole)

    def _routed(self, x_TI: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """Sort the (token, expert) pairs by expert, run each expert once over its run, put the results back in place."""
        tokens, top = expert_TK.shape
        order = expert_TK.flatten().argsort(stable=True)
        counts = torch.bincount(expert_TK.flatten(), minlength=len(self.experts)).tolist()
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        pairs = x_TI[:, None].expand(-1, top, -1).reshape(tokens * top, -1)
        runs = zip(self.experts, permuted(pairs, order, back).split_with_sizes(counts), strict=True)
        sorted_y = torch.cat([expert(run) for expert, run in runs if len(run)])
        y_TKI = permuted(sorted_y, back, order).view(tokens, top, -1)
        return (y_TKI * weight_TK[:, :, None]).sum(1)

    def readers(self, name: str) -> tuple[Port, ...]:
        """What reads the block's input: the router, the gates of outputs, every expert; `name` is the block's own below the model."""
        scorers = tuple(Port(at) for at, part in self.named_modules(prefix=name) if isinstance(part, Scorer))
        return scorers + tuple(port for at, feed in self._feed_forwards(name) for port in feed.readers(at))

    def junctions(self, name: str) -> list[Junction]:
        """Those inside each expert: routed, shared or added."""
        return [junction for at, feed in self._feed_forwards(name) for junction in feed.junctions(at)]

    def units(self, name: str) -> list[Units]:
        """The routed experts, each with its row and bias of the router, and the channels inside every expert."""
        scores = [Place(f"{name}.gate.weight", 0)]
        if self.gate.e_score_correction_bias is not None:
            scores.append(Place(f"{name}.gate.e_score_correction_bias", 0))
        at, groups = f"{name}.experts", self.gate.moe.n_group
        experts = Units(at, "experts", "n_routed_experts", len(self.experts), tuple(scores), members=at, groups=groups)
        return [experts, *(units for at, feed in self._feed_forwards(name) for units in self._channels(at, feed))]

    def _channels(self, name: str, feed: FeedForward) -> list[Units]:
        return feed.units(name, "shared_expert_intermediate_size" if feed is self.shared_expert else "moe_intermediate_size")

    def _feed_forwards(self, name: str) -> Iterator[tuple[str, FeedForward]]:
        """Every expert by its name below the model."""
        return ((at, part) for at, part in self.named_modules(prefix=name) if isinstance(part, FeedForward))


class OutputGate(Scorer):
    """One number a token that an expert's output is scaled by; never compressed, since it is a single row."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1)

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, hidden] to [T, 1]."""
        if self.packed is None:
            return ops.linear(x_TI, self.weight, None)
        return ops.packed_linear(x_TI, self.packed[1], self.packed[0], None, False)

    def packable(self) -> Tensor:
        """In its own dtype, as the product beside it."""
        return self.weight.detach()


class AddedExpert(nn.Module):
    """An expert that joins a finished model: gate(x) * expert(x), the gate's weights zero at first (as in arXiv 2003.04887).

    With a zero gate it adds exactly nothing, yet the gate has a gradient, so training can open it.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.expert = FeedForward(hidden, width)
        self.gate = OutputGate(hidden)

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        return ops.scaled(self.expert(x_TI), self.gate(x_TI))


def permuted(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x[order] for a permutation `order` of the rows, `back` being its inverse.

    Autograd's own gradient of x[order] adds into rows one by one; a permutation's is the way back, several times faster.
    """
    rows: Tensor = _Permute.apply(x, order, back)  # type: ignore[no-untyped-call] # torch leaves Function.apply untyped
    return rows


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back], None, None
