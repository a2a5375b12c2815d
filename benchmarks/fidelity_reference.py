"""What the model itself says, for benchmarks/fidelity.py: whole passes in plain PyTorch; no engine, no cache, no native kernels.

A process of its own, since a process has one instruction set: a job as JSON on stdin, the reference as JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.isa import FORCE, library

RANKED = 128
"""Likeliest tokens that are kept of each place of an answer: a quarter of the vocabulary."""
AT_ONCE = 16
"""Rows in a pass."""


@dataclass(frozen=True)
class Texts:
    """Token ids: rows of one length to be scored, prompts of one length to be answered."""

    rows: list[list[int]]
    prompts: list[list[int]]
    new_tokens: int = 64


@dataclass(frozen=True)
class Reference:
    """The judge of all variants, when it was worked out in float32."""

    losses: list[float]
    """Nats a token of each row."""
    answers: list[list[int]]
    """The greedy answer to each prompt, up to its end token. What comes after one was never trained and says nothing."""
    ranked: list[list[list[tuple[int, float]]]]
    """Of each place of each answer the likeliest tokens and their log-probabilities, likeliest first."""

    def gap(self, answer: int, place: int, token: int) -> float:
        """By how many nats this token is less likely than the one chosen there; infinite when it is not among the ranked."""
        ranked = self.ranked[answer][place]
        return ranked[0][1] - dict(map(tuple, ranked)).get(token, -float("inf"))


def reference(folder: Path, texts: Texts, dtype: str = "float32") -> Reference:
    """Ask a child."""
    job = json.dumps({"folder": str(folder), "dtype": dtype, **asdict(texts)})
    alone = {**os.environ, FORCE: "none"}
    told = subprocess.run([sys.executable, __file__], input=job, stdout=subprocess.PIPE, text=True, env=alone, check=True)
    return Reference(**json.loads(told.stdout))


def logits(model: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """float32 [rows, length, vocabulary] of rows that don't see each other."""
    count, length = rows.shape
    attend = PackedCausal(range(0, count * length, length), count * length, length)
    return model(rows.flatten(), torch.arange(length).repeat(count), attend).float().view(count, length, -1)


def losses(model: Decoder, rows: torch.Tensor) -> list[float]:
    """Nats a token of each row."""
    nats = F.cross_entropy(logits(model, rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return nats.view(len(rows), -1).mean(1).tolist()


def answered(model: Decoder, rows: torch.Tensor, new_tokens: int) -> tuple[list[list[int]], list[list[list[tuple[int, float]]]]]:
    """Greedy answers, each token from a pass over all that is before it, and the ranking at each place.

    Prompts of one length stay in step, so an answer that has ended is carried along and cut at last.
    """
    begin, ranked = rows.shape[1], [[] for _ in rows]
    for _ in range(new_tokens):
        chances = F.log_softmax(logits(model, rows)[:, -1], -1)
        best = chances.topk(RANKED)
        for places, ids, values in zip(ranked, best.indices.tolist(), best.values.tolist(), strict=True):
            places.append(list(zip(ids, values, strict=True)))
        rows = torch.cat([rows, chances.argmax(-1, keepdim=True)], 1)
    return [until_end(model, answer) for answer in rows[:, begin:].tolist()], ranked


def until_end(model: Decoder, answer: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(answer, 1) if token in model.config.eos_token_ids]
    return answer[: ends[0]] if ends else answer


@torch.inference_mode()
def main() -> None:
    assert library() is None
    job = json.load(sys.stdin)
    model = load_checkpoint(Path(job["folder"]), dtype=getattr(torch, job["dtype"]))
    found = Reference([], [], [])
    for rows in torch.tensor(job["rows"]).split(AT_ONCE):
        found.losses.extend(losses(model, rows))
    for prompts in torch.tensor(job["prompts"]).split(AT_ONCE):
        answers, ranked = answered(model, prompts, job["new_tokens"])
        found.answers.extend(answers)
        found.ranked.extend(ranked)
    json.dump(asdict(found), sys.stdout)


if __name__ == "__main__":
    main()
