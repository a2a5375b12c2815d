"""The calibrated steps as stages: a checkpoint and tokens made with its tokenizer, to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from lineshaft.base.errors import ConfigError
from lineshaft.base.manifest import Kind
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.base.terminal import say
from lineshaft.compress.calibrate.config import CalibrationConfig
from lineshaft.compress.calibrate.rows import calibration_rows
from lineshaft.compress.calibrate.walk import Method, walk
from lineshaft.compress.calibrate_preflight import Calibrating, Config, judge_calibrating
from lineshaft.compress.config import AwqConfig, GptqConfig, SmoothConfig, StaticConfig
from lineshaft.compress.layers import chosen, routed, warn_of_experts
from lineshaft.compress.methods import Awq, Gptq, Smooth, Static
from lineshaft.compress.proof import Tolerance, remember
from lineshaft.compress.stage import finish, formats_of
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.folder import load_config
from lineshaft.model.memory import stored_in
from lineshaft.ops.formats import DENSE
from lineshaft.records.tokens import TokenStream
from lineshaft.text import contract
from lineshaft.train.batches import RowReader
from lineshaft.train.stage import check_tokenizer

C = TypeVar("C", bound=CalibrationConfig)


def _settle(config: C, parents: Mapping[str, Artifact]) -> C:
    checkpoint = parents["checkpoint"]
    check_tokenizer("compress", checkpoint, parents["tokens"])
    most = load_config(checkpoint.root).max_position_embeddings
    if config.sequence_tokens > most:
        told = "take shorter rows (sequence_tokens)"
        raise ConfigError(f"compress: rows of {config.sequence_tokens} tokens exceed the model's max_position_embeddings {most}: {told}")
    return config


def _round_by(
    draft: Draft, model: Decoder, config: GptqConfig | AwqConfig | StaticConfig, method: Method, nearest: bool = False
) -> None:
    layers = chosen(model, config, "compress")
    before = remember(model, draft.parents["checkpoint"].root)
    scales = _walked(draft, model, config, method)
    warn_of_experts(model, "compress")
    finish(draft, model, before, Tolerance(config.tolerated_nats, nearest=nearest, scales=scales))
    draft.facts |= {"format": formats_of(model), "layers": len(layers)}


def _loaded(draft: Draft, config: Config) -> Decoder:
    """The model, unless memory would not suffice for the rows that there are."""
    source = draft.parents["checkpoint"]
    contract.check_folder(source.root)
    given = Calibrating.of(load_config(source.root), stored_in(source.root), config)
    rows = RowReader(TokenStream(draft.parents["tokens"], "train"), config.sequence_tokens).rows
    judge_calibrating(replace(given, sequences=min(given.sequences, rows))).enforce()
    return load_checkpoint(source.root)


def _walked(draft: Draft, model: Decoder, calibration: CalibrationConfig, method: Method) -> Mapping[str, Any]:
    """Carry out the method; says, and notes in the draft's facts, what the calibration text did not reach."""
    rows = calibration_rows(draft.parents["tokens"], calibration, model.config)
    scales, unseen = walk(model, rows, method, draft.scratch)
    if unseen:
        shown = ", ".join(unseen[:3]) + (" ..." if len(unseen) > 3 else "")
        say(f"{method.name}: no calibration token came to {len(unseen)} layers ({shown}): they are rounded to nearest; give it more text")
    draft.facts |= {"calibration_tokens": sum(len(around.batch.tokens_T) for around in rows), "layers_without_tokens": unseen}
    return scales


def _build_gptq(draft: Draft, config: GptqConfig) -> None:
    _round_by(draft, _loaded(draft, config), config, Gptq(config))


def _build_awq(draft: Draft, config: AwqConfig) -> None:
    _round_by(draft, _loaded(draft, config), config, Awq(config))


def _build_static(draft: Draft, config: StaticConfig) -> None:
    model = _loaded(draft, config)
    experts = routed(model)
    if experts:
        say(f"static: the {len(experts)} layers of routed experts keep one scale a token: few tokens come to each")
    _round_by(draft, model, config, Static(config, experts), nearest=True)


def _build_smooth(draft: Draft, config: SmoothConfig) -> None:
    model = _loaded(draft, config)
    for name, linear in model.linears().items():
        if linear.format != DENSE:
            told = "outliers can only be moved into dense weights; smooth the checkpoint that it was made from"
            raise ConfigError(f"smooth: {name} is stored as {linear.format.describe()}: {told}")
    before = remember(model, draft.parents["checkpoint"].root)
    scales = _walked(draft, model, config, Smooth(config))
    finish(draft, model, before, Tolerance(config.proof_nats, scales=scales))
    draft.facts |= {"format": "dense", "largest_scale": round(max(float(s_C.max()) for s_C in scales.values()), 4)}


_PARENTS: Mapping[str, Kind] = {"checkpoint": "checkpoint", "tokens": "tokens"}

GPTQ = Stage(name="gptq", kind="checkpoint", version=2, config=GptqConfig, build=_build_gptq, parents=_PARENTS, settle=_settle)
STATIC = Stage(name="static", kind="checkpoint", version=1, config=StaticConfig, build=_build_static, parents=_PARENTS, settle=_settle)
AWQ = Stage(name="awq", kind="checkpoint", version=2, config=AwqConfig, build=_build_awq, parents=_PARENTS, settle=_settle)
SMOOTH = Stage(name="smooth", kind="checkpoint", version=2, config=SmoothConfig, build=_build_smooth, parents=_PARENTS, settle=_settle)
