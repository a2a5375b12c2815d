"""What the texts of two models have in common with each other, and with how the documents really go on: BLEU and ROUGE.

Scores go from 0 to 100. BLEU is sacrebleu's, of all texts together; ROUGE is the mean F1 of the texts. Intervals are those of a
bootstrap over prompts: a resample takes whole prompts, the same ones for every score, so a drop is one of pairs.

Shape letters: R prompts, S resamples, K BLEU's counts (both lengths, matches and totals of runs of 1 to 4 words), 3 kinds of ROUGE.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lineshaft.evaluate.rouge import KINDS, rouge
from lineshaft.evaluate.statistics import Floats, Interval, percentiles, resampled
from lineshaft.records.generations import Generation

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

Script = Literal["latin", "chinese", "other"]
Scores = dict[str, Floats]
"""Name of a score to its values, one a resample."""
NAMES = ("bleu", *KINDS)
CHINESE_SHARE = 0.1
"""Texts are cut as Chinese from this share of Chinese characters among their letters on: few of them say as much as many letters."""
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORDS: dict[Script, re.Pattern[str]] = {
    "latin": re.compile(r"[a-z0-9]+"),  # as rouge-score has it
    "chinese": re.compile(rf"[{_HAN}]|[^\W{_HAN}]+"),
    "other": re.compile(r"\w+"),
}
"""What is a word for ROUGE, in lower case. BLEU has sacrebleu's tokenizers: `zh` for Chinese, else `13a`."""


@dataclass(frozen=True)
class Overlap:
    """The texts of an old and a new model beside each other. Intervals hold with 95 % for prompts like these."""

    prompts: int
    script: Script
    signature: str
    """Of BLEU, as sacrebleu has it: who repeats it with these settings gets the same number."""
    same: Interval
    """Share of prompts with which both go on in the same tokens."""
    between: dict[str, Interval]
    """Score to that of the new texts, with the old ones as references."""
    old: dict[str, float]
    """Score to that of the old texts, with the documents as references."""
    new: dict[str, float]
    drop: dict[str, Interval]
    """Score to old - new."""


def overlap(old: Sequence[Generation], new: Sequence[Generation]) -> Overlap:
    """Both models' texts for the same two or more prompts, in the same order."""
    truths, before, after = [item.truth for item in old], [item.text for item in old], [item.text for item in new]
    script = script_of(truths)
    pairs = {"between": (before, after), "old": (truths, before), "new": (truths, after)}
    counted = {name: Counted.of(script, *texts) for name, texts in pairs.items()}
    counts_SR = resampled(len(old))
    whole = {name: item.scores(np.ones((1, len(old)))) for name, item in counted.items()}
    again = {name: item.scores(counts_SR) for name, item in counted.items()}
    same_R = np.array([float(ours.ids == theirs.ids) for ours, theirs in zip(old, new, strict=True)])

    def drop(scores: dict[str, Scores], name: str) -> Floats:
        return scores["old"][name] - scores["new"][name]

    return Overlap(
        len(old),
        script,
        signature=_bleu(script).get_signature().format(),
        same=percentiles(float(same_R.mean()), counts_SR @ same_R / len(old), len(old)),
        between={name: percentiles(float(whole["between"][name][0]), again["between"][name], len(old)) for name in NAMES},
        old={name: float(whole["old"][name][0]) for name in NAMES},
        new={name: float(whole["new"][name][0]) for name in NAMES},
        drop={name: percentiles(float(drop(whole, name)[0]), drop(again, name), len(old)) for name in NAMES},
    )


def script_of(texts: Sequence[str]) -> Script:
    """How these texts are cut into words: by their Chinese characters, else by whether most of their letters are ASCII."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    chinese = sum(re.match(f"[{_HAN}]", letter) is not None for letter in letters)
    if letters and chinese >= CHINESE_SHARE * len(letters):
        return "chinese"
    return "latin" if 2 * sum(letter.isascii() for letter in letters) >= len(letters) else "other"


def words_of(text: str, script: Script) -> list[str]:
    """The words that ROUGE counts."""
    return _WORDS[script].findall(text.lower())


@dataclass(frozen=True)
class Counted:
    """Texts beside their references, prompt by prompt: all that the scores of any choice of prompts are made of."""

    bleu_RK: Floats
    rouge_R3: Floats

    @classmethod
    def of(cls, script: Script, references: Sequence[str], texts: Sequence[str]) -> Counted:
        """Count once, so that thousands of resamples only add up."""
        pairs = list(zip(references, texts, strict=True))
        single = [_bleu(script).corpus_score([text], [[reference]]) for reference, text in pairs]
        bleu = [[item.sys_len, item.ref_len, *item.counts, *item.totals] for item in single]
        lines = [rouge(words_of(reference, script), words_of(text, script)) for reference, text in pairs]
        return cls(np.array(bleu, np.float64), np.array(lines, np.float64))

    def scores(self, counts_SR: Floats) -> Scores:
        """Of resamples, given by how often each takes each prompt."""
        rouge_S3 = 100 * counts_SR @ self.rouge_R3 / counts_SR.sum(1, keepdims=True)
        bleu_S = np.array([_of_counts(sums_K) for sums_K in (counts_SR @ self.bleu_RK).round().astype(int).tolist()])
        return {"bleu": bleu_S} | dict(zip(KINDS, rouge_S3.T, strict=True))


def _of_counts(sums_K: list[int]) -> float:
    found, wanted, *runs = sums_K
    half = len(runs) // 2
    return float(_bleu("latin").compute_bleu(runs[:half], runs[half:], found, wanted, smooth_method="exp").score)


@functools.cache
def _bleu(script: Script) -> BLEU:
    """As sacrebleu computes it by default. `force` only hushes its warning about texts that look cut into words."""
    from sacrebleu.metrics.bleu import BLEU  # here, since nobody needs it who compares no texts; 30 ms and lxml

    return BLEU(tokenize="zh" if script == "chinese" else "13a", force=True)
