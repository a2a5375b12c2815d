"""Speed is measured in a process of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError, EngineError
from lineshaft.base.store import Artifact
from lineshaft.engine.config import EngineConfig
from lineshaft.evaluate.speed import WRITTEN_AT_ONCE, Job, Speed, SpeedConfig, measure, quantile

WORKLOAD = SpeedConfig(prompt_tokens=8, output_tokens=4, requests=3, batch=5)
PAD = 0
"""Stands behind texts that ended early; it is the token that begins documents, and no text holds it."""
PROMPTS = [[2 + (n + place) % 26 for place in range(8)] for n in range(5)]


def job(folder: Path, **changes: object) -> Job:
    return Job(folder=str(folder), workload=WORKLOAD, engine=EngineConfig(), prompts=PROMPTS).model_copy(update=changes)


@pytest.fixture(scope="module")
def speed(parents: dict[str, Artifact]) -> Speed:
    return measure(job(parents["checkpoint"].root))


def test_a_workload_is_measured(speed: Speed) -> None:
    assert len(speed.first_token) == len(speed.latency) == 3
    assert all(0 < first < last < 30 for first, last in zip(speed.first_token, speed.latency, strict=True))
    assert 0 < speed.batch_seconds < 30
    assert 0 < speed.load_seconds < 60
    assert 50e6 < speed.peak_memory_bytes < 2e9
    assert speed.threads >= 1


def greedy(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers writes, 40 tokens or up to an end token. Prompts of one length go through it together."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = theirs.generation_config.eos_token_id
    with torch.inference_mode():
        asked = torch.tensor(prompts)
        whole = {"attention_mask": torch.ones_like(asked), "pad_token_id": PAD}  # else the first tokens, too, would be taken for padding
        texts = theirs.generate(asked, max_new_tokens=40, do_sample=False, **whole)[:, len(prompts[0]) :]
    assert ends != PAD
    return [[token for token in text if token != PAD] for text in texts.tolist()]


def test_texts_are_the_greedy_ones_of_transformers_and_end_where_the_model_does(parents: dict[str, Artifact], tmp_path: Path) -> None:
    """More prompts than go in at once; a letter that about half of the texts hold becomes the end token."""
    folder = shutil.copytree(parents["checkpoint"].root, tmp_path / "ending")
    prompts = [[0, 2 + first, 2 + (5 * first + step) % 26] for first in range(26) for step in range(3)]
    assert len(prompts) > WRITTEN_AT_ONCE
    endless = greedy(folder, prompts)
    end = min(range(2, 28), key=lambda letter: abs(sum(letter in text for text in endless) - len(endless) / 2))
    (folder / "manifest.json").unlink()  # a plain folder now, free to change
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": end}))
    answers = measure(job(folder, written=prompts, most_written=40)).answers
    assert [answer.ids for answer in answers] == greedy(folder, prompts)
    assert {(answer.finish, answer.ids[-1] == end) for answer in answers} == {("stop", True), ("length", False)}


def test_a_large_parent_does_not_count(parents: dict[str, Artifact], speed: Speed) -> None:
    """What a process once held stays with those it starts, if nothing is done: the parent's peak would be taken for the child's."""
    ballast = b"x" * (300 << 20)
    large = measure(job(parents["checkpoint"].root))
    assert len(ballast) > speed.peak_memory_bytes / 2
    assert large.peak_memory_bytes < speed.peak_memory_bytes + (60 << 20)


def test_a_folder_that_can_not_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"measuring .* failed: .*: no config.json here; a checkpoint is a Hugging Face folder") as failed:
        measure(job(tmp_path))
    assert "\n" not in str(failed.value)
    assert "lineshaft.base.errors" not in str(failed.value)


def test_a_process_that_dies_without_a_word_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="its process ended with status 1 and said nothing"):
        measure(job(tmp_path))


def test_one_token_has_no_speed_of_decoding() -> None:
    with pytest.raises(ConfigError, match='"output_tokens"'):
        load(SpeedConfig, {"output_tokens": 1})


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_numpys(samples: list[float], share: float) -> None:
    assert quantile(samples, share) == float(np.quantile(np.array(samples), share))


def test_half_of_the_samples_lie_below_the_median() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([1.0, 2.0], 0.99) == pytest.approx(1.99)
