"""The evaluator refuses a checkpoint whose chat contract is broken, before anything is scored."""

from __future__ import annotations

import letter_line
import planted
import pytest

from lineshaft.base.errors import BrokenContract
from lineshaft.base.store import Artifact, Store
from lineshaft.evaluate import stage
from lineshaft.evaluate.stage import EVALUATE, EvaluateConfig


def test_a_newline_that_the_template_has_lost_is_refused(
    store: Store, parents: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = planted.with_template(store, "checkpoint", parents["checkpoint"].root, lost=True)
    words = planted.with_template(store, "tokenizer", lost=False)
    tokens = letter_line.tokens(store, words, letter_line.documents(1, 20), letter_line.documents(2, 5), version=9)
    monkeypatch.setattr(stage, "load_checkpoint", None)
    with pytest.raises(BrokenContract, match=f"{checkpoint.id}: .*{planted.SHOWN}"):
        EVALUATE(store, EvaluateConfig(sequence_tokens=16), checkpoint=checkpoint, tokens=tokens)
