"""The compression stage: store the weights of linear layers in fewer bits."""

from __future__ import annotations

from collections import Counter

from lineshaft.base.errors import ConfigError
from lineshaft.base.machine import large_blocks_returned
from lineshaft.base.stage import Stage
from lineshaft.base.store import Draft
from lineshaft.base.terminal import bar
from lineshaft.compress.config import CompressConfig, Rounding
from lineshaft.compress.layers import chosen, warn_of_experts
from lineshaft.compress.preflight import Compressing, judge_compressing
from lineshaft.compress.proof import Before, Tolerance, prove, remember
from lineshaft.model.checkpoint import load_checkpoint, quantised_share_of_fp32, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.folder import load_config
from lineshaft.model.memory import stored_in
from lineshaft.ops.formats import DENSE
from lineshaft.text import contract


def compress(model: Decoder, config: Rounding) -> list[str]:
    """Recode the model's linear layers in place; returns the names of those that are not left as they are.

    Raises ConfigError naming a layer that does not fit or is compressed already, or a pattern that means no layer.
    """
    layers = chosen(model, config, "compress")
    with bar("compress", len(layers)) as progress, large_blocks_returned():
        for name, linear in layers.items():
            try:
                linear.recode(config.coding_of(name))
            except ConfigError as error:
                raise ConfigError(f"compress: {name}: {error}; or add it to skip") from None
            progress.advance()
    warn_of_experts(model, "compress")
    return sorted(layers)


def _build(draft: Draft, config: CompressConfig) -> None:
    source = draft.parents["checkpoint"]
    contract.check_folder(source.root)
    judge_compressing(Compressing(load_config(source.root), stored_in(source.root), config.formats)).enforce()
    model = load_checkpoint(source.root)
    before = remember(model, source.root)
    layers = compress(model, config)
    finish(draft, model, before, Tolerance(config.tolerated_nats))
    draft.facts |= {"format": formats_of(model), "layers": len(layers)}


def finish(draft: Draft, model: Decoder, before: Before, tolerance: Tolerance) -> None:
    """Write the model into the draft and prove it; facts as far as they don't depend on the method."""
    source = draft.parents["checkpoint"]
    save_checkpoint(model, draft.root, source.root)
    seen = prove(before, model, draft.root, tolerance)
    inherited = {name: source.manifest.facts[name] for name in ("parameters", "active_parameters") if name in source.manifest.facts}
    draft.facts |= contract.carried(source, draft.root) | inherited | seen
    if (share := quantised_share_of_fp32(model)) is not None:
        draft.facts["quantised_share_of_fp32"] = share


def formats_of(model: Decoder) -> str:
    """The formats of compressed layers, for people, that of most layers first."""
    counts = Counter(linear.format.describe() for linear in model.linears().values() if linear.format != DENSE)
    return "; ".join(name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


COMPRESS = Stage(
    name="compress",
    kind="checkpoint",
    version=4,
    config=CompressConfig,
    build=_build,
    parents={"checkpoint": "checkpoint"},
)
