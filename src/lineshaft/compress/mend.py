"""What reads the units that stay takes over from those that go: least squares on the text that pruning calibrates on.

A layer that reads a block's units, down after the channels or the output projection after the heads, gives W x of all of them. Without
the units that go, the weight W' of those that stay (K) which changes its outputs least over calibration inputs X has

    W' = W_s + (W X X_K^T - W_s X_K X_K^T) (X_K X_K^T + d I)^-1

where W_s adds up at stand-ins what read both (shrink.py) and d, DAMP of the mean diagonal, keeps W' near it where inputs say little: a
copy still goes without a trace. That is the step of optimal brain surgeon for a layer's outputs (Frantar and Alistarh 2022, arXiv
2208.11580, equation 3), for many units at once.

Shape letters: O outputs, I inputs, K inputs that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lineshaft.compress.calibrate.observe import Wanted, watching
from lineshaft.model.decoder import Decoder
from lineshaft.model.shrink import Cut, with_stand_ins
from lineshaft.train.batches import Batch
from lineshaft.train.objective import Objective

DAMP = 0.01


@torch.no_grad()
def mend(model: Decoder, cuts: Sequence[Cut], batches: Iterable[Batch], objective: Objective) -> None:
    """Give `model` the weights W', zero where units go, so that taking these out (`shrink.without`) leaves W'.

    Dense weights; new ones are put in their place, the old tensors stay as they are. Layers that no token came to, as experts may be, are
    left to their stand-ins. `objective`: runs every layer, those that predict further included.
    """
    linears = model.linears()
    readers = [(cut, place, linears[place.tensor.removesuffix(".weight")]) for cut in cuts for place in cut.units.readers]
    with watching({place.tensor: linear for _, place, linear in readers}, Wanted(gram=True)) as seen:
        for batch in batches:
            objective(model, batch)
    for cut, place, linear in readers:
        if place.tensor in seen and (gram_II := seen[place.tensor].gram_II) is not None:
            kept_K = torch.arange(linear.in_features).view(cut.units.count, -1)[cut.kept].flatten()
            weight_OI = linear.weight.detach()
            mended_OK = refitted(weight_OI, with_stand_ins(weight_OI, place, cut)[:, kept_K], gram_II, kept_K)
            linear.weight = nn.Parameter(torch.zeros_like(weight_OI).index_copy_(1, kept_K, mended_OK), requires_grad=False)


def refitted(weight_OI: Tensor, start_OK: Tensor, gram_II: Tensor, kept_K: Tensor) -> Tensor:
    """W' [O, K] of the equation above: `start_OK` is W_s, `gram_II` is X X^T. Worked out in float64, given in the weight's dtype."""
    gram_IK = gram_II.double()[:, kept_K]
    gram_KK, start = gram_IK[kept_K], start_OK.double()
    damp = DAMP * gram_KK.diagonal().mean()
    if not damp > 0:  # nothing ever came from what stays
        return start_OK
    missing_OK = weight_OI.double() @ gram_IK - start @ gram_KK
    change_OK: Tensor = torch.linalg.solve(gram_KK + damp * torch.eye(len(kept_K), dtype=torch.float64), missing_OK.T).T
    return (start + change_OK).to(weight_OI.dtype)
