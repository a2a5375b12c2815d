"""ROUGE against rouge-score, which we did not write."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from written import scorer

from lineshaft.evaluate.rouge import KINDS, longest_common, rouge
from lineshaft.evaluate.texts import words_of

Few = st.lists(st.sampled_from("abcd"), max_size=70)  # few kinds of words, so that runs and subsequences come again
Text = st.one_of(st.text(), st.text(" .-'\nabcABC019éßİK"), st.text("猫坐在垫子上 cat，。"))


class Cut:
    """Chinese text cut by us, for rouge-score to count."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text, "chinese")


def theirs(oracle: RougeScorer, reference: str, text: str) -> list[float]:
    found = oracle.score(reference, text)
    return [found[kind].fmeasure for kind in KINDS]


@given(Few, Few)
def test_scores_of_words_are_those_of_rouge_score(reference: list[str], text: list[str]) -> None:
    wanted = theirs(scorer(), " ".join(reference), " ".join(text))
    assert rouge(reference, text) == pytest.approx(wanted, abs=1e-12)


@given(Text, Text)
@example("The cat's hat, 3.5 m", "the CAT s hat 3 5 M")
def test_scores_of_any_text_are_those_of_rouge_score(reference: str, text: str) -> None:
    wanted = theirs(scorer(), reference, text)
    assert rouge(words_of(reference, "latin"), words_of(text, "latin")) == pytest.approx(wanted, abs=1e-12)


@given(Text, Text)
def test_chinese_is_scored_by_characters_as_rouge_score_does_when_told_so(reference: str, text: str) -> None:
    wanted = theirs(RougeScorer(list(KINDS), tokenizer=Cut()), reference, text)
    assert rouge(words_of(reference, "chinese"), words_of(text, "chinese")) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [("", "", 0), ("a", "", 0), ("abcbdab", "bdcaba", 4), ("abc", "cba", 1), ("ab" * 100, "ba" * 100, 199), ("aaaa", "aa", 2)],
)
def test_the_longest_common_subsequence_of_known_pairs(ours: str, theirs: str, common: int) -> None:
    assert longest_common(ours, theirs) == longest_common(theirs, ours) == common
