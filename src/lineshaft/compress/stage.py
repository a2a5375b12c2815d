"""The compression stage: store the weights of linear layers in fewer bits."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from lineshaft.base.config import Config
from lineshaft.base.errors import ConfigError
from lineshaft.base.machine import large_blocks_returned
from lineshaft.base.stage import Stage
from lineshaft.base.store import Draft
from lineshaft.base.terminal import bar
from lineshaft.compress.preflight import Compressing, described, judge_compressing
from lineshaft.compress.proof import prove, remember
from lineshaft.model.checkpoint import load_checkpoint, quantised_share_of_fp32, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.folder import load_config
from lineshaft.model.linear import Linear
from lineshaft.model.memory import stored_in
from lineshaft.ops.formats import DENSE, Integer
from lineshaft.text import contract


class CompressConfig(Config):
    """Quantisation of weights by rounding to nearest."""

    format: Literal["int8", "int4"] = "int8"
    """How weights are stored."""
    group: PositiveInt | None = None
    """Inputs that share a scale; null: one scale a channel. 32 gives 8.5 or 4.5 bits a weight, 128 gives 8.125 or 4.125."""
    symmetric: bool = True
    """Zero lies in the middle of the codes; false (int4 only): each group has a code of zero of its own, 4 bits more."""
    activations: Literal["int8"] | None = None
    """int8: products round what meets these weights as well, a scale a token: faster prompts, another rounding."""
    skip: list[str] = ["lm_head"]
    """Layers left as they are: names or patterns such as `model.layers.0.*`."""

    proof_nats: PositiveFloat | None = None
    """Nats a token by which next-token chances on a golden text may differ from the source's; more, and nothing is kept. Null: 0.05
    for int8, 0.5 for int4."""

    @model_validator(mode="after")
    def _supported(self) -> CompressConfig:
        if self.format == "int8" and not self.symmetric:
            raise ValueError("symmetric: int8 has no zero points here: leave it true, or take format int4")
        return self

    @property
    def coding(self) -> Integer:
        """The layout in which other engines expect it: 8-bit codes that meet 8-bit activations lie one a byte."""
        bits: Literal[8, 4] = 8 if self.format == "int8" else 4
        whole = bits == 8 and self.activations is not None
        return Integer(bits, self.group, self.symmetric, self.activations, "int-quantized" if whole else "pack-quantized")

    @property
    def tolerated_nats(self) -> float:
        """`proof_nats`, or what it means."""
        return self.proof_nats or (0.05 if self.format == "int8" else 0.5)


def compress(model: Decoder, config: CompressConfig) -> list[str]:
    """Recode the model's linear layers in place; returns their names.

    Raises ConfigError naming a layer that does not fit or is compressed already, or a skip pattern that means no layer.
    """
    layers = _chosen(model, config.skip)
    with bar("compress", len(layers)) as progress, large_blocks_returned():
        for name, linear in layers.items():
            try:
                linear.recode(config.coding)
            except ConfigError as error:
                raise ConfigError(f"compress: {name}: {error}; or add it to skip") from None
            progress.advance()
    return sorted(layers)


def _chosen(model: Decoder, skip: list[str]) -> dict[str, Linear]:
    linears = model.linears()
    for pattern in skip:
        # A tied head is no layer of its own, so the default may find nothing; any other miss is a slip of the pen.
        if pattern != "lm_head" and not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigError(f'compress: skip: "{pattern}" is no layer of this model; its layers are named like {next(iter(linears))}')
    chosen = {name: linear for name, linear in linears.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}
    if not chosen:
        raise ConfigError("compress: skip leaves no layer to compress")
    for name, linear in chosen.items():
        if linear.format != DENSE:
            told = "rounding it twice would cost quality unseen: compress the checkpoint that this one was made from"
            raise ConfigError(f"compress: {name} is stored as {linear.format.describe()} already; {told}")
    return chosen


def _build(draft: Draft, config: CompressConfig) -> None:
    source = draft.parents["checkpoint"]
    contract.check_folder(source.root)
    judge_compressing(Compressing(load_config(source.root), stored_in(source.root), described(config.coding))).enforce()
    model = load_checkpoint(source.root)
    before = remember(model)
    layers = compress(model, config)
    save_checkpoint(model, draft.root, source.root)
    seen = prove(before, model, draft.root, config.coding, config.tolerated_nats)
    inherited = {name: source.manifest.facts[name] for name in ("parameters", "active_parameters") if name in source.manifest.facts}
    draft.facts |= contract.carried(source, draft.root) | inherited | {"format": config.coding.describe(), "layers": len(layers)} | seen
    draft.facts["quantised_share_of_fp32"] = quantised_share_of_fp32(model)


COMPRESS = Stage(
    name="compress",
    kind="checkpoint",
    version=3,
    config=CompressConfig,
    build=_build,
    parents={"checkpoint": "checkpoint"},
)
