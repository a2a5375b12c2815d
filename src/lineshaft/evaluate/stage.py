"""The evaluation stage: a checkpoint and held-out tokens to a report."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, PositiveInt

from lineshaft.base.config import Config
from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.base.machine import machine
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.engine.activations import rounding
from lineshaft.engine.cache import page_bytes
from lineshaft.engine.cache_dtype import cache_dtype
from lineshaft.engine.config import EngineConfig
from lineshaft.evaluate.bigram import Bigram
from lineshaft.evaluate.generate import GenerateConfig, generations_of, prompts_of
from lineshaft.evaluate.quality import HeldOut, Score, score_bigram, score_model
from lineshaft.evaluate.speed import Job, Speed, SpeedConfig, measure, quantile
from lineshaft.model.checkpoint import load_checkpoint, quantised_share_of_fp32
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.model.folder import load_config
from lineshaft.model.shards import weights_bytes
from lineshaft.records.generations import write_generations
from lineshaft.records.report import Measured, Report, write_report
from lineshaft.records.tokens import TokenStream
from lineshaft.text import contract
from lineshaft.text.tokenizer import Tokenizer
from lineshaft.train.batches import RowReader
from lineshaft.train.stage import check_tokenizer


class EvaluateConfig(Config):
    """What is measured, and at what price."""

    sequence_tokens: PositiveInt = 256
    """Held-out text is read in rows of this many tokens."""
    max_tokens: PositiveInt = 1_000_000
    """Most held-out tokens to score."""
    usd_per_hour: float = Field(0.10, gt=0)
    """Price of the machine that serves; state yours."""
    speed: SpeedConfig = SpeedConfig()
    generate: GenerateConfig = GenerateConfig()
    engine: EngineConfig = EngineConfig()


def _settle(config: EvaluateConfig, parents: Mapping[str, Artifact]) -> EvaluateConfig:
    check_tokenizer("evaluate", parents["checkpoint"], parents["tokens"])
    return config


def _build(draft: Draft, config: EvaluateConfig) -> None:
    checkpoint, tokens = draft.parents["checkpoint"], draft.parents["tokens"]
    contract.check_folder(checkpoint.root)
    _check_room(load_config(checkpoint.root), tokens, config)
    cache_dtype(load_config(checkpoint.root), config.engine, _dtype(checkpoint, config.engine))  # raises before anything is scored
    model = rounding(load_checkpoint(checkpoint.root, dtype=torch.float32, active_experts=config.engine.active_experts), config.engine)
    heldout = TokenStream(tokens, "heldout")
    prompts = _prompts(heldout, config.speed)
    words = Tokenizer.load(checkpoint.root)
    written = prompts_of(heldout, config.generate, words)
    text = HeldOut(RowReader(heldout, config.sequence_tokens), [len(piece) for piece in words.token_bytes()], config.max_tokens)
    score = score_model(model, text)
    baseline = score_bigram(Bigram(TokenStream(tokens, "train"), model.config.vocab_size), text)
    speed = measure(
        Job(
            folder=str(checkpoint.root),
            workload=config.speed,
            engine=config.engine,
            prompts=prompts,
            written=[prompt.ids for prompt in written],
            most_written=config.generate.output_tokens,
        )
    )
    quantised = {linear.format.describe() for linear in model.linears().values()} - {"dense"}
    report = Report(
        subject=checkpoint.id,
        format=", ".join(sorted(quantised)) or "dense",
        metrics=_quality(score, baseline) | _size(model, checkpoint, config.engine),
        documents=[[number, *sums] for number, sums in sorted(score.by_document.items())],
        notes=[
            "Quality is computed with FP32 activations; held-out documents were never trained on.",
            *_engine_notes(config.engine),
            *(_no_texts(config.generate) if not written else []),
        ],
    )
    metrics, samples = _speed(speed, config)
    measured = Measured(metrics=metrics, samples=samples, machine=machine() | {"threads": speed.threads})
    draft.facts["tokenizer_sha256"] = tokens.manifest.facts["tokenizer_sha256"]
    write_generations(draft, generations_of(written, speed.answers, words))
    write_report(draft, report, measured, torch.cat(score.greedy).numpy())


def _engine_notes(engine: EngineConfig) -> list[str]:
    cache = "Speed is that of a cache in 8 bits; quality is computed without a cache."
    rounded = "Quality and speed are those of activations rounded to 8 bits where they meet integer weights, as engine.activations says."
    return [*([cache] if engine.cache_dtype == "int8" else []), *([rounded] if engine.activations == "int8" else [])]


def _no_texts(config: GenerateConfig) -> list[str]:
    need = config.prompt_tokens + config.output_tokens
    told = f"No texts were written: fewer than two held-out documents have {need} tokens (generate.prompt_tokens + generate.output_tokens)."
    return [told] if config.prompts else []


def _check_room(model: ModelConfig, tokens: Artifact, config: EvaluateConfig) -> None:
    """Refuse at once what would fail, or mean nothing, after the scoring."""
    context, vocabulary = model.max_position_embeddings, tokens.manifest.facts["vocab_size"]
    for name, wanted in (
        ("sequence_tokens", config.sequence_tokens),
        ("speed.prompt_tokens + speed.output_tokens", config.speed.prompt_tokens + config.speed.output_tokens),
        ("generate.prompt_tokens + generate.output_tokens", config.generate.most_tokens),
    ):
        if wanted > context:
            raise ConfigError(f"evaluate: {name} is {wanted}, more than the model's context of {context} tokens: lower it")
    if vocabulary > model.vocab_size:
        told = "they do not belong together"
        raise BadCheckpoint(f"the tokenizer has {vocabulary} tokens, the model's vocab_size is {model.vocab_size}: {told}")


def _prompts(stream: TokenStream, workload: SpeedConfig) -> list[list[int]]:
    """Held-out prompts spread over the whole stream, whatever its length."""
    count, size = max(workload.requests, workload.batch), workload.prompt_tokens
    if len(stream) < size:
        raise ConfigError(f"evaluate: the held-out text has {len(stream)} tokens, fewer than speed.prompt_tokens {size}")
    step = (len(stream) - size) / count
    return [stream.read(int(i * step), int(i * step) + size).tolist() for i in range(count)]


def _quality(score: Score, baseline: Score) -> dict[str, float]:
    return {
        "loss_nats_per_token": score.loss,
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "next_token_accuracy": score.accuracy,
        "heldout_tokens": score.tokens,
        "bigram_loss_nats_per_token": baseline.loss,
        "bigram_bits_per_byte": baseline.bits_per_byte,
        "bits_per_byte_below_bigram": 1 - score.bits_per_byte / baseline.bits_per_byte,
    }


def _size(model: Decoder, checkpoint: Artifact, engine: EngineConfig) -> dict[str, float]:
    cost, size = cost_of(model.config), weights_bytes(checkpoint.root)
    share = quantised_share_of_fp32(model)
    return {
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "weights_bytes": size,
        "bits_per_weight": 8 * size / cost.parameters,
        "kv_bytes_per_token": page_bytes(model.config, 1, cache_dtype(model.config, engine, _dtype(checkpoint, engine))),
    } | ({} if share is None else {"quantised_share_of_fp32": share})


def _dtype(checkpoint: Artifact, engine: EngineConfig) -> torch.dtype:
    """Of the model as the engine holds it. Weights loaded without a cast are only mapped, so this costs nothing."""
    if engine.dtype != "auto":
        return torch.bfloat16 if engine.dtype == "bfloat16" else torch.float32
    return next(load_checkpoint(checkpoint.root).parameters()).dtype


def _speed(speed: Speed, config: EvaluateConfig) -> tuple[dict[str, float], dict[str, list[float]]]:
    workload = config.speed
    decode = [(workload.output_tokens - 1) / (whole - first) for first, whole in zip(speed.first_token, speed.latency, strict=True)]
    throughput = workload.batch * workload.output_tokens / speed.batch_seconds
    metrics = {
        "peak_memory_bytes": float(speed.peak_memory_bytes),
        "load_seconds": speed.load_seconds,
        "prefill_tokens_per_second": workload.prompt_tokens / quantile(speed.first_token, 0.5),
        "decode_tokens_per_second": quantile(decode, 0.5),
        "batch_decode_tokens_per_second": throughput,
        "usd_per_million_tokens": config.usd_per_hour / (throughput * 3600) * 1e6,
    }
    latency = {f"latency_p{percent}_seconds": quantile(speed.latency, percent / 100) for percent in (50, 90, 99)}
    return metrics | latency, {"latency_seconds": speed.latency, "first_token_seconds": speed.first_token}


EVALUATE = Stage(
    name="evaluate",
    kind="report",
    version=3,
    config=EvaluateConfig,
    build=_build,
    parents={"checkpoint": "checkpoint", "tokens": "tokens"},
    settle=_settle,
)
