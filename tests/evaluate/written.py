"""Texts that models might have written: sentences of few words, so that runs of them come again; and their oracle."""

from __future__ import annotations

import random
import sys

from absl import logging as absl_logging
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from lineshaft.evaluate.rouge import KINDS
from lineshaft.records.generations import Generation

absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
# rouge-score imports absl, whose handler closes its stream whenever a tool sets up logging anew: that would be the stream pytest captures.

ENGLISH = ["the", "a", "cat", "dog", "sat", "on", "mat,", "and.", "It", "is", "don't", "(here)", "3.5"]
CHINESE = [*"猫坐在垫子上，狗不在这里。", "GPT", "3.5", "模型", "压缩"]


def scorer() -> RougeScorer:
    """rouge-score as it is by default. Left to itself it logs that, and so gives the root logger a handler."""
    return RougeScorer(list(KINDS), tokenizer=DefaultTokenizer(use_stemmer=False))


def line(luck: random.Random, words: list[str] = ENGLISH, between: str = " ") -> str:
    return between.join(luck.choice(words) for _ in range(luck.randrange(6, 25)))


def generation(number: int, truth: str, text: str) -> Generation:
    ids = [ord(letter) for letter in text]
    prompt = f"prompt {number}"
    asked = [ord(letter) for letter in prompt]
    return Generation(document=number, prompt_ids=asked, prompt=prompt, truth=truth, ids=ids, text=text, finish_reason="length")


def models(seed: int, count: int, words: list[str] = ENGLISH, between: str = " ") -> tuple[list[Generation], list[Generation]]:
    """An old model that is right about every other word, and a new one that writes the same text two times in three."""
    luck = random.Random(seed)
    old, new = [], []
    for number in range(count):
        truth = line(luck, words, between)
        parts = truth.split(between) if between else list(truth)
        text = between.join(part if luck.random() < 0.7 else luck.choice(words) for part in parts)
        old.append(generation(number, truth, text))
        new.append(generation(number, truth, text if luck.random() < 0.67 else line(luck, words, between)))
    return old, new
