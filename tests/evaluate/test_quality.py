"""Scores against transformers, and the arithmetic behind them."""

from __future__ import annotations

import math
from pathlib import Path

import letter_line
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lineshaft.base.store import Artifact
from lineshaft.evaluate.bigram import Bigram
from lineshaft.evaluate.quality import ROWS_AT_ONCE, HeldOut, Score, score_bigram, score_model
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.records.tokens import TokenStream
from lineshaft.train.batches import RowReader

ONE_BYTE = [0, 0, *[1] * letter_line.LETTERS]
ROW = 16


@pytest.fixture
def heldout(parents: dict[str, Artifact]) -> TokenStream:
    return TokenStream(parents["tokens"], "heldout")


def test_the_models_score_is_transformers_loss_on_the_same_tokens(heldout: TokenStream, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(vocab_size=28, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.4)
    ).eval()
    theirs.save_pretrained(tmp_path)
    text = HeldOut(RowReader(heldout, ROW), ONE_BYTE, 40 * ROW)
    score = score_model(load_checkpoint(tmp_path), text)
    nats = count = right = 0.0
    tokens, starts = heldout.read(0, 40 * ROW + 1).tolist(), set(heldout.starts().tolist())
    for part in parts_of(starts):  # each part of a document by itself, as transformers would be asked
        inner = torch.tensor([tokens[part.start : part.stop]])
        with torch.inference_mode():
            logits = theirs(inner).logits[0].double()
        for place in part:
            if place + 1 not in starts:
                nats -= float(logits[place - part.start].log_softmax(-1)[tokens[place + 1]])
                right += int(logits[place - part.start].argmax()) == tokens[place + 1]
                count += 1
    assert (score.tokens, score.correct) == (count, right)
    assert score.nats == pytest.approx(nats, rel=1e-5)


def parts_of(starts: set[int]) -> list[range]:
    """Where a document or a row begins, up to where the next one does."""
    begins = sorted({*range(0, 40 * ROW, ROW), *(start for start in starts if start < 40 * ROW)})
    return [range(first, last) for first, last in zip(begins, [*begins[1:], 40 * ROW], strict=True)]


def test_the_score_does_not_depend_on_how_many_rows_go_at_once(
    heldout: TokenStream, parents: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_checkpoint(parents["checkpoint"].root)
    text = HeldOut(RowReader(heldout, ROW), ONE_BYTE, 10**9)
    one = score_model(model, text)
    monkeypatch.setattr("lineshaft.evaluate.quality.ROWS_AT_ONCE", 3)
    other = score_model(model, text)
    assert (one.tokens, one.correct, one.text_bytes) == (other.tokens, other.correct, other.text_bytes)
    assert one.nats == pytest.approx(other.nats, rel=1e-6)


def test_the_model_and_the_baseline_are_asked_the_same(heldout: TokenStream, parents: dict[str, Artifact]) -> None:
    text = HeldOut(RowReader(heldout, ROW), ONE_BYTE, 10**9)
    model = score_model(load_checkpoint(parents["checkpoint"].root), text)
    baseline = score_bigram(Bigram(TokenStream(parents["tokens"], "train"), letter_line.VOCABULARY), text)
    assert (model.tokens, model.text_bytes) == (baseline.tokens, baseline.text_bytes)
    assert baseline.loss < 1.7  # each letter has three that follow it, and some texts end early


@pytest.mark.parametrize(("max_tokens", "rows"), [(1, 1), (ROW, 1), (3 * ROW, 3), (11 * ROW + 5, 11), (10**9, None)])
def test_whole_rows_are_read_up_to_the_limit(heldout: TokenStream, max_tokens: int, rows: int | None) -> None:
    reader = RowReader(heldout, ROW)
    pairs = list(HeldOut(reader, ONE_BYTE, max_tokens).batches())
    batches = [batch for batch, _ in pairs]
    tokens = torch.cat([batch.tokens_T for batch in batches]).numpy()
    assert len(tokens) == (rows or reader.rows) * ROW
    assert (tokens == heldout.read(0, len(tokens))).all()
    assert max(len(batch.tokens_T) for batch in batches) <= ROWS_AT_ONCE * ROW
    begins = np.zeros(len(tokens), int)
    begins[heldout.starts()[heldout.starts() < len(tokens)]] = 1
    assert (torch.cat([document_T for _, document_T in pairs]).numpy() == begins.cumsum() - 1).all()


def test_bytes_are_counted_by_target(heldout: TokenStream) -> None:
    text = HeldOut(RowReader(heldout, ROW), [0, 0, 3, *[1] * 25], 10**9)
    assert text.text_bytes(torch.tensor([1, 2, 2, 5, 0])) == 7


def test_a_score_divides_what_it_has_added_up() -> None:
    score = Score(nats=6 * math.log(2), tokens=4, correct=1, text_bytes=3)
    assert score.bits_per_byte == pytest.approx(2.0)
    assert score.loss == pytest.approx(1.5 * math.log(2))
    assert score.perplexity == pytest.approx(2**1.5)
    assert score.accuracy == 0.25
