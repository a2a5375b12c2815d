"""A finished run made of small artifacts in a real store: facts, reports and answers with figures that tests know."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from lineshaft.base.store import Artifact, Store
from lineshaft.pipeline.outcome import Node, Outcome
from lineshaft.records.exchange import Exchange, Timing, write_exchanges
from lineshaft.records.generations import Generation, write_generations
from lineshaft.records.report import Measured, Report, write_report

HOSTILE = "<script>alert('太好了')</script> & \x1b[31mred\x1b[0m \u202eevil"
DROPPED = {"too_short": 2210, "exact_duplicate": 1204, "low_quality": 96, "never_happened": 0, "control_characters": 3}
NODES = ("data", "tokenizer", "tokens", "train", "compress", "evaluate_base", "evaluate_compressed", "serve")
BASE = {
    "loss_nats_per_token": 2.31457,
    "bits_per_byte": 1.20312,
    "perplexity": 10.1206,
    "next_token_accuracy": 0.5182,
    "heldout_tokens": 151234.0,
    "bigram_loss_nats_per_token": 3.98104,
    "bigram_bits_per_byte": 2.06935,
    "bits_per_byte_below_bigram": 0.41860,
    "parameters": 4_812_544.0,
    "active_parameters": 3_105_024.0,
    "weights_bytes": 19_272_704.0,
    "bits_per_weight": 32.037,
    "kv_bytes_per_token": 1152.0,
}
COMPRESSED = BASE | {
    "loss_nats_per_token": 2.31702,
    "bits_per_byte": 1.20439,
    "perplexity": 10.1454,
    "next_token_accuracy": 0.5177,
    "bits_per_byte_below_bigram": 0.41798,
    "weights_bytes": 5_244_160.0,
    "bits_per_weight": 8.717,
    "quantised_share_of_fp32": 0.25912,
}
SPEED = {
    "peak_memory_bytes": 412_483_584.0,
    "load_seconds": 1.82,
    "prefill_tokens_per_second": 8123.4,
    "decode_tokens_per_second": 212.7,
    "batch_decode_tokens_per_second": 903.2,
    "usd_per_million_tokens": 0.0307,
}
MACHINE = {"cpu": "Some Processor 9000 <b>", "cores": 2, "versions": {"python": "3.11.9", "torch": "2.13.0"}}


class Shop:
    """Makes artifacts the way stages do, with payloads that only these tests need."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.made: dict[str, Artifact] = {}

    def make(self, name: str, kind: str, fill, **parents: str) -> Artifact:
        config = {"node": name, "steps": 600, "optimizer": {"lr": 0.003, "betas": [0.9, 0.95]}, "loop": {"precision": "bfloat16"}}
        known = {role: self.made[parent] for role, parent in parents.items() if parent in self.made}
        inputs = {"documents/a.md": "ab" * 32} if name == "data" else {}
        with self.store.draft(kind, stage=name.split("_")[0], version=1, config=config, inputs=inputs, parents=known) as draft:
            fill(draft)
        found = next(item for item in self.store.all() if item.config["node"] == name)
        self.made[name] = self.store.open(found.id)
        return self.made[name]


def losses(steps: int = 300) -> list[float]:
    """A falling, jagged curve without a random generator."""
    return [2.3 + 6.2 * math.exp(-step / 40) + 0.12 * math.sin(step * 2.4) + 0.15 * math.sin(step * step) for step in range(1, steps + 1)]


def latencies(scale: float, count: int = 40) -> list[float]:
    return [scale * (0.09 + 0.06 * number / count + 0.15 * (number / count) ** 9) for number in range(count)]


def quantiles(samples: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return {f"latency_p{number}_seconds": cuts[number - 1] for number in (50, 90, 99)}


def documents(loss: float) -> list[list[float]]:
    """Of 30 held-out documents: number, nats, tokens, right ones; some harder than others, and not all as much harder for every model."""
    sizes = [40 + 7 * (number % 5) for number in range(30)]
    return [[number, size * loss * (1 + 0.1 * math.sin(number * loss)), size, size // 2] for number, size in enumerate(sizes)]


def generations(words: str) -> list[Generation]:
    """Of 6 prompts; every third text is the truth."""
    truths = [f"document {number} goes on like this and ends there" for number in range(6)]
    texts = [truth if number % 3 == 0 else f"document {number} goes {words}" for number, truth in enumerate(truths)]
    return [
        Generation(document=n, prompt_ids=[n], prompt="p", truth=truth, ids=list(text.encode()), text=text, finish_reason="length")
        for n, (truth, text) in enumerate(zip(truths, texts, strict=True))
    ]


def fill_data(draft) -> None:
    splits = {"train": {"documents": 16_640, "bytes": 9_100_000}, "heldout": {"documents": 360, "bytes": 210_000}}
    draft.facts |= {"read": 20_513, "kept": 17_000, "dropped": DROPPED, "valid_share": 0.82874, "splits": splits, "something_new": True}


def fill_train(draft) -> None:
    rows = [{"step": step, "loss": loss, "lr": 0.001, "grad_norm": 1.0, "tokens": step * 4096} for step, loss in enumerate(losses(), 1)]
    (draft.root / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.facts |= {"parameters": 4_812_544, "active_parameters": 3_105_024}
    draft.aside |= {"tokens_per_second": 5321.9}


def fill_report(subject: str, words: str, metrics: dict, speed: dict, scale: float, machine: dict):
    def fill(draft) -> None:
        rows = documents(metrics["loss_nats_per_token"])
        report = Report(subject=subject, format=words, metrics=metrics, notes=["Loss is over whole documents."], documents=rows)
        write_generations(draft, generations(words))
        write_report(
            draft,
            report,
            Measured(metrics=speed | quantiles(latencies(scale)), samples={"latency_seconds": latencies(scale)}, machine=machine),
        )

    return fill


def fill_serve(answer: str, subject: str):
    def fill(draft) -> None:
        asked = "What does <b>json.dumps</b> do? 请回答"
        exchange = Exchange(model=subject, prompt=asked, answer=answer, finish_reason="length", prompt_tokens=9, completion_tokens=48)
        write_exchanges(draft, [(exchange, Timing(ready_seconds=2.4, first_token_seconds=0.031, seconds=0.41))])

    return fill


def finished(root: Path, names=NODES, *, answer: str = HOSTILE, extra: int = 0, cached=("tokenizer",)) -> Outcome:
    """A run of the named nodes, and of `extra` more compressed variants."""
    shop = Shop(root)

    def variant(name: str, number: int) -> None:
        smaller = COMPRESSED | {"weights_bytes": COMPRESSED["weights_bytes"] / number, "bits_per_byte": 1.20439 + 0.05 * (number - 1)}
        subject = shop.make(name, "checkpoint", lambda draft: draft.facts.update(parameters=4_812_544), source="train", data="tokens")
        speed = {key: value * 0.9 for key, value in SPEED.items()}
        words = "int8, one scale a channel"
        report = fill_report(subject.id, words, smaller, speed, 0.9, MACHINE)
        shop.make(name.replace("compress", "evaluate_compressed"), "report", report, checkpoint=name, tokens="tokens")

    if "data" in names:
        shop.make("data", "corpus", fill_data)
    if "tokenizer" in names:
        shop.make("tokenizer", "tokenizer", lambda draft: draft.facts.update(vocab_size=4096), corpus="data")
    if "tokens" in names:
        shop.make("tokens", "tokens", lambda draft: draft.facts.update(train={"tokens": 2_400_000}), corpus="data", tokenizer="tokenizer")
    if "train" in names:
        base = shop.make("train", "checkpoint", fill_train, tokens="tokens", tokenizer="tokenizer")
        if "evaluate_base" in names:
            shop.make(
                "evaluate_base", "report", fill_report(base.id, "float32", BASE, SPEED, 1.0, MACHINE), checkpoint="train", tokens="tokens"
            )
    if "compress" in names:
        for number in range(1, extra + 2):
            variant("compress" if number == 1 else f"compress_{number}", number)
    if "serve" in names:
        last = "compress" if "compress" in names else "train"
        shop.make("serve", "traffic", fill_serve(answer, shop.made[last].id), checkpoint=last)
    nodes = [Node(name, artifact, name in cached, 0.0 if name in cached else 1.5) for name, artifact in shop.made.items()]
    return Outcome("quickstart", 7, nodes)
