"""The compression stage: store the weights of linear layers in fewer bits."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt

from lineshaft.base.config import Config
from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.base.stage import Stage
from lineshaft.base.store import Draft
from lineshaft.base.terminal import bar
from lineshaft.model.checkpoint import load_checkpoint, quantised_share_of_fp32, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import Int8


class CompressConfig(Config):
    """Weight-only quantisation by rounding to nearest."""

    format: Literal["int8"] = "int8"
    """How weights are stored."""
    group: PositiveInt | None = None
    """Inputs that share a scale; null: one scale a channel. 32 gives 8.5 bits a weight."""
    skip: list[str] = ["lm_head"]
    """Layers left as they are: names or patterns such as `model.layers.0.*`."""


def compress(model: Decoder, config: CompressConfig) -> list[str]:
    """Recode the model's linear layers in place; returns their names. Raises ConfigError naming a layer that does not fit."""
    layers = {name: linear for name, linear in model.linears().items() if not any(fnmatchcase(name, pattern) for pattern in config.skip)}
    if not layers:
        raise ConfigError("compress: skip leaves no layer to compress")
    with bar("compress", len(layers)) as progress:
        for name, linear in layers.items():
            try:
                linear.recode(Int8(config.group))
            except ConfigError as error:
                raise ConfigError(f"compress: {name}: {error}; or add it to skip") from None
            progress.advance()
    return sorted(layers)


def _build(draft: Draft, config: CompressConfig) -> None:
    source = draft.parents["checkpoint"]
    model = load_checkpoint(source.root)
    layers = compress(model, config)
    save_checkpoint(model, draft.root, source.root)
    _prove(model, draft.root)
    inherited = {name: source.manifest.facts[name] for name in ("parameters", "active_parameters") if name in source.manifest.facts}
    draft.facts |= inherited | {"format": Int8(config.group).describe(), "layers": len(layers)}
    draft.facts["quantised_share_of_fp32"] = quantised_share_of_fp32(model)


def _prove(model: Decoder, folder: Path) -> None:
    """What was written must load to the very tensors that were worked out."""
    written = load_checkpoint(folder).state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(written[name], tensor):
            raise BadCheckpoint(f"{folder}: {name} does not read back as it was compressed; the disk or the writer is at fault")


COMPRESS = Stage(
    name="compress",
    kind="checkpoint",
    version=1,
    config=CompressConfig,
    build=_build,
    parents={"checkpoint": "checkpoint"},
)
