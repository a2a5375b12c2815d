"""The loss: documents count as they would alone, and prediction layers learn what comes after the next token."""

from __future__ import annotations

import letter_line
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.train.batches import IGNORE, Batch
from lineshaft.train.objective import NextToken, one_further


def fresh(depths: int) -> Decoder:
    shape = letter_line.TINY.model_dump() | {"vocab_size": letter_line.VOCABULARY, "num_nextn_predict_layers": depths}
    model = Decoder(ModelConfig.model_validate(shape))
    model.initialise(5)
    return model


def row_of(documents: list[list[int]]) -> Batch:
    """Whole documents in one row; the last token of each has nothing to predict."""
    starts = torch.tensor([sum(map(len, documents[:number])) for number in range(len(documents))])
    tokens = torch.tensor([token for document in documents for token in document])
    targets = torch.tensor([token for document in documents for token in [*document[1:], IGNORE]])
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    return Batch(tokens, positions, targets, starts, len(tokens))


def by_hand(model: Decoder, documents: list[list[int]], weight: float) -> tuple[float, float]:
    """(next token, total) from each document alone, with only the rows that have something to predict."""
    main, further, depths = 0.0, 0.0, model.config.num_nextn_predict_layers
    for document in documents:
        text = torch.tensor(document)
        hidden = model.hidden(text, torch.arange(len(text)), PackedCausal([0], len(text)))
        main += F.cross_entropy(model.logits(hidden[:-1]), text[1:], reduction="sum").item()
        for depth in range(depths):
            rows = len(text) - depth - 1
            if rows < 1:
                break
            hidden = model.draft(depth, hidden[:rows], text[depth + 1 :], torch.arange(rows), PackedCausal([0], rows))
            further += F.cross_entropy(model.logits(hidden[:-1]), text[depth + 2 :], reduction="sum").item()
    return main, main + weight / depths * further


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), depths=st.integers(1, 3))
def test_documents_in_a_row_cost_what_they_cost_alone(lengths: list[int], depths: int) -> None:
    documents = [torch.randint(0, letter_line.VOCABULARY, (length,)).tolist() for length in lengths]
    model = fresh(depths)
    with torch.no_grad():
        loss = NextToken(0.3)(model, row_of(documents))
        assert (loss.next_token.item(), loss.total.item()) == pytest.approx(by_hand(model, documents, 0.3), rel=1e-5, abs=1e-5)


def test_targets_one_further_end_with_the_document() -> None:
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0])
    targets = torch.tensor([5, 6, 7, IGNORE, 8, IGNORE, 9])
    assert one_further(targets, positions).tolist() == [6, 7, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]


def test_without_prediction_layers_the_whole_loss_is_that_of_the_next_token() -> None:
    loss = NextToken()(fresh(0), row_of([[2, 3, 4]]))
    assert loss.total is loss.next_token


def learnt() -> tuple[Decoder, list[int]]:
    """A model that knows its one text, in which letters go round by threes, and that text."""
    text = [2 + (3 * place) % 26 for place in range(40)]
    model, batch = fresh(1), row_of([text])
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(60):
        NextToken()(model, batch).total.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval().requires_grad_(False), text


def hidden_of(model: Decoder, text: list[int]) -> torch.Tensor:
    return model.hidden(torch.tensor(text), torch.arange(len(text)), PackedCausal([0], len(text)))


def test_prediction_layers_learn_to_foretell() -> None:
    model, text = learnt()
    rows = len(text) - 1
    draft = model.draft(0, hidden_of(model, text)[:rows], torch.tensor(text[1:]), torch.arange(rows), PackedCausal([0], rows))
    assert model.logits(draft[:-1]).argmax(-1).tolist() == text[2:]


def greedy(model: Decoder, text: list[int], count: int) -> list[int]:
    for _ in range(count):
        text = [*text, int(model.logits(hidden_of(model, text)[-1:]).argmax())]
    return text


def greedy_with_drafts(model: Decoder, text: list[int], count: int) -> tuple[list[int], int]:
    """The same, each round checking the draft of the round before; and the number of rounds."""
    end, rounds, draft = len(text) + count, 0, []
    while len(text) < end:
        rounds += 1
        hidden = hidden_of(model, [*text, *draft])
        chosen = model.logits(hidden[len(text) - 1 :]).argmax(-1).tolist()
        accepted = draft if draft == chosen[: len(draft)] else []
        text = [*text, *accepted, chosen[len(accepted)]]
        known = len(text) - 1  # rows whose next token is known
        guess = model.draft(0, hidden[:known], torch.tensor(text[1:]), torch.arange(known), PackedCausal([0], known))
        draft = [int(model.logits(guess[-1:]).argmax())]
    return text[:end], rounds


def test_drafts_change_the_number_of_rounds_and_never_the_answer() -> None:
    model, text = learnt()
    for learned, most in ((model, 13), (fresh(1).requires_grad_(False), 24)):
        answer, rounds = greedy_with_drafts(learned, text[:9], 24)
        assert answer == greedy(learned, text[:9], 24)
        assert rounds <= most  # with every draft right: the first round, then two tokens a round
