"""Which linear layers a stage is to compress, and what other tools make of the choice."""

from __future__ import annotations

from fnmatch import fnmatchcase

from lineshaft.base.errors import ConfigError
from lineshaft.base.terminal import say
from lineshaft.compress.config import Rounding
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.model.moe import ExpertBlock
from lineshaft.ops.formats import DENSE


def chosen(model: Decoder, config: Rounding, stage: str) -> dict[str, Linear]:
    """The layers that skip and policy leave to be compressed, by name.

    Raises ConfigError, which begins with the stage's name, for a pattern that means no layer, where none is left, and naming a layer
    that is compressed already.
    """
    linears = model.linears()
    for what, pattern in [*(("skip", item) for item in config.skip), *(("policy", item) for item in config.policy)]:
        # A tied head is no layer of its own, so it may find nothing; any other miss is a slip of the pen.
        if pattern != "lm_head" and not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigError(f'{stage}: {what}: "{pattern}" is no layer of this model; its layers are named like {next(iter(linears))}')
    for name, linear in linears.items():
        if linear.format != DENSE:
            told = "rounding it twice would cost quality unseen: take the checkpoint that this one was made from"
            raise ConfigError(f"{stage}: {name} is stored as {linear.format.describe()} already; {told}")
    found = {name: linear for name, linear in linears.items() if config.coding_of(name) != DENSE}
    if not found:
        raise ConfigError(f"{stage}: skip and policy leave no layer to compress")
    return found


def routed(model: Decoder) -> frozenset[str]:
    """Names of the linear layers that belong to routed experts."""
    blocks = {f"{name}.experts." for name, module in model.named_modules() if isinstance(module, ExpertBlock)}
    return frozenset(name for name in model.linears() if any(name.startswith(block) for block in blocks))


def warn_of_experts(model: Decoder, stage: str) -> None:
    """Say where routed experts are stored in several ways: other tools take them to be alike (tests/compress/test_in_transformers.py)."""
    blocks = [module for module in model.modules() if isinstance(module, ExpertBlock)]
    formats = {linear.format for block in blocks for linear in block.experts.modules() if isinstance(linear, Linear)}
    if len(formats) > 1:
        shown = ", ".join(sorted(fmt.describe() for fmt in formats))
        say(f"{stage}: routed experts have several formats ({shown}): lineshaft runs them, transformers gives other logits without a word")
