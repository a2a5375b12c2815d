"""Models with random weights, all of which count."""

from __future__ import annotations

import torch

from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.norm import RmsNorm


@torch.no_grad()
def filled(config: ModelConfig, seed: int = 0, spread: float = 0.3) -> Decoder:
    """Random in every number: norms, biases, balancing biases and added gates as well."""
    model = Decoder(config).eval()
    generator = torch.Generator().manual_seed(seed)
    steering = [router.e_score_correction_bias for router in model.routers() if router.e_score_correction_bias is not None]
    for tensor in [*model.parameters(), *steering]:
        tensor.normal_(0.0, spread, generator=generator)
    for norm in (module for module in model.modules() if isinstance(module, RmsNorm)):
        norm.weight.add_(1.0)
    return model
