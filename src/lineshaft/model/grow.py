"""Making a finished model larger without changing what it answers."""

from __future__ import annotations

import torch

from lineshaft.base.errors import ConfigError
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.moe import AddedExpert, ExpertBlock


def add_experts(model: Decoder, count: int, seed: int) -> None:
    """Give every layer with experts `count` more, in place; their gates are zero, so every answer stays as it was to the bit.

    Fresh weights are drawn with the model's initializer_range. Raises ConfigError for a model without experts.
    """
    moe = model.config.moe
    if moe is None or count < 1:
        raise ConfigError("experts can be added to models that have some, one or more at a time")
    generator = torch.Generator().manual_seed(seed)
    for block in [module for module in model.modules() if isinstance(module, ExpertBlock)]:
        for _ in range(count):
            block.added_experts.append(_fresh(model.config, block, generator))
    larger = moe.model_copy(update={"n_added_experts": moe.n_added_experts + count})
    model.config = model.model.config = model.config.model_copy(update={"moe": larger})


@torch.no_grad()
def _fresh(config: ModelConfig, block: ExpertBlock, generator: torch.Generator) -> AddedExpert:
    assert config.moe is not None
    added = AddedExpert(config.hidden_size, config.moe.moe_intermediate_size)
    for parameter in added.expert.parameters():
        parameter.normal_(0.0, config.initializer_range, generator=generator)
    added.gate.weight.zero_()
    return added.to(dtype=block.gate.weight.dtype).train(block.training)
