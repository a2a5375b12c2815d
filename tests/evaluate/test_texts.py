"""Texts of two models beside each other: the scores of sacrebleu and rouge-score, and the intervals that their own bootstraps give."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.scoring import BootstrapAggregator
from sacrebleu.metrics import BLEU
from written import CHINESE, ENGLISH, generation, line, models, scorer

from lineshaft.evaluate.rouge import KINDS
from lineshaft.evaluate.statistics import percentiles, resampled
from lineshaft.evaluate.texts import NAMES, Counted, overlap, script_of, words_of
from lineshaft.records.generations import Generation


def texts(found: list[Generation]) -> list[str]:
    return [item.text for item in found]


@pytest.mark.parametrize(("words", "between", "cut"), [(ENGLISH, " ", "13a"), (CHINESE, "", "zh")])
def test_scores_are_those_of_the_libraries(words: list[str], between: str, cut: str) -> None:
    old, new = models(3, 40, words, between)
    truths = [item.truth for item in old]
    found = overlap(old, new)
    for told, hypotheses, references in (
        (found.old["bleu"], texts(old), truths),
        (found.new["bleu"], texts(new), truths),
        (found.between["bleu"].estimate, texts(new), texts(old)),
    ):
        assert told == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references], tokenize=cut).score, abs=1e-9)
    assert f"tok:{cut}|smooth:exp|version:{sacrebleu.__version__}" in found.signature
    for name in NAMES:
        assert found.drop[name].estimate == pytest.approx(found.old[name] - found.new[name])
    if cut == "13a":
        theirs = scorer()
        for kind in KINDS:
            wanted = np.mean([theirs.score(item.truth, item.text)[kind].fmeasure for item in new])
            assert found.new[kind] == pytest.approx(100 * wanted, abs=1e-9)


@given(
    st.lists(
        st.tuples(st.text("猫坐 ,.-'&;\nabcABC019", max_size=30), st.text("猫坐 ,.-'&;\nabcABC019", max_size=30)), min_size=1, max_size=5
    )
)
def test_bleu_from_counts_of_single_texts_is_that_of_the_corpus(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for script, cut in (("latin", "13a"), ("chinese", "zh")):
        bleu = Counted.of(script, references, hypotheses).scores(np.ones((1, len(pairs))))["bleu"]
        assert bleu[0] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references], tokenize=cut, force=True).score, abs=1e-9)


def test_intervals_are_about_those_of_the_libraries_own_bootstraps() -> None:
    """With 300 prompts Student's t hardly moves the ends; what is left is the luck of the draw, about 5 % of the width."""
    old, new = models(5, 300)
    found = overlap(old, new)
    bleu = BLEU().corpus_score(texts(new), [texts(old)], n_bootstrap=2000)
    ours = found.between["bleu"]
    assert (ours.low, ours.high) == pytest.approx((bleu._mean - bleu._ci, bleu._mean + bleu._ci), abs=0.1 * 2 * bleu._ci)
    theirs, aggregate = scorer(), BootstrapAggregator(n_samples=2000)
    for before, after in zip(old, new, strict=True):
        aggregate.add_scores(theirs.score(before.text, after.text))
    for kind, wanted in aggregate.aggregate().items():
        low, high = 100 * wanted.low.fmeasure, 100 * wanted.high.fmeasure
        assert (found.between[kind].low, found.between[kind].high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_a_model_that_writes_the_same_texts_lost_nothing_and_surely_so() -> None:
    """The resamples of both are the same ones: that a drop is one of pairs shows in an interval without width."""
    old, _ = models(7, 20)
    found = overlap(old, old)
    assert (found.same.estimate, found.same.low, found.same.high) == (1, 1, 1)
    for name in NAMES:
        assert (found.drop[name].low, found.drop[name].estimate, found.drop[name].high) == (0, 0, 0)
        assert found.between[name].low == pytest.approx(100) and found.between[name].high == pytest.approx(100)


def test_a_model_that_writes_nonsense_is_worse_by_every_score() -> None:
    old, _ = models(9, 24)
    luck = random.Random(1)
    new = [generation(item.document, item.truth, line(luck, ["x", "y", "z"])) for item in old]
    found = overlap(old, new)
    assert all(found.drop[name].verdict() == "worse" and found.new[name] < 5 for name in NAMES)
    assert found.same.high < 0.1


def test_the_same_texts_give_the_same_intervals_again() -> None:
    old, new = models(11, 10)
    assert overlap(old, new) == overlap(old, new)


def test_two_prompts_are_enough_and_say_that_nothing_is_sure() -> None:
    old, new = models(2, 2)
    found = overlap(old, [new[0], old[1]] if new[0].ids != old[0].ids else [old[0], generation(1, old[1].truth, "no word of it")])
    assert (found.same.low, found.same.estimate, found.same.high) == (0, 0.5, 1)


def test_empty_texts_score_nothing() -> None:
    old = [generation(number, "the cat sat on a mat", "") for number in range(3)]
    found = overlap(old, old)
    assert (found.old["bleu"], found.between["bleu"].estimate, found.old["rouge1"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("The cat sat.", "latin"),
        ("Le café était fermé", "latin"),
        ("", "latin"),
        ("3.5 + 4", "latin"),
        ("猫坐在垫子上。", "chinese"),
        ("用 transformers 压缩模型", "chinese"),
        ("the word 猫 means cat", "latin"),
        ("Кошка сидела на коврике", "other"),
    ],
)
def test_the_script_follows_from_the_letters(text: str, script: str) -> None:
    assert script_of([text]) == script


def test_words_of_each_script() -> None:
    assert words_of("Don't, café 3.5 猫", "latin") == ["don", "t", "caf", "3", "5"]
    assert words_of("GPT模型，第3章 𠀀 café", "chinese") == ["gpt", "模", "型", "第", "3", "章", "𠀀", "café"]
    assert words_of("Кошка, 3 ёлки", "other") == ["кошка", "3", "ёлки"]


def test_intervals_of_eight_rows_hold_the_truth_as_often_as_they_say() -> None:
    """95 % is promised; plain percentiles of a bootstrap would hold it in about 89 %. Chance moves 3000 runs by 0.4 points."""
    generator, runs, rows = np.random.default_rng(0), 3000, 8
    counts_SR = resampled(rows)
    held = 0
    for _ in range(runs):
        value_R = generator.normal(size=rows)
        found = percentiles(float(value_R.mean()), counts_SR @ value_R / rows, rows)
        held += found.low < 0 < found.high
    assert 0.93 < held / runs < 0.97


def test_the_server_and_the_command_line_do_not_load_sacrebleu() -> None:
    code = "import sys, lineshaft.cli.start, lineshaft.cli.serving, lineshaft.serve.server, lineshaft.cli.main\n"
    code += "print('sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
