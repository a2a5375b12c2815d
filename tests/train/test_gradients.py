"""Every family trains as its original does: the same loss, and the same gradient of every weight, as transformers'."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))  # the toys that transformers builds

from toys import VOCABULARY, agree, prompt, written_by_transformers

from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.moe import Router
from lineshaft.train.batches import IGNORE, Batch
from lineshaft.train.objective import NextToken

FAMILIES = [
    "deepseek",
    "deepseek-yarn-two-mscales",
    "deepseek_v2-groups",
    "deepseek_v32",
    "llama",
    "mistral-window",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
]
TEXTS = (14, 9)


def packed() -> Batch:
    """Two documents in one row."""
    texts = [prompt(length, seed) for seed, length in enumerate(TEXTS)]
    targets = [token for text in texts for token in [*text[1:], IGNORE]]
    positions = torch.cat([torch.arange(length) for length in TEXTS])
    tokens = [token for text in texts for token in text]
    return Batch(torch.tensor(tokens), positions, torch.tensor(targets), torch.tensor([0, TEXTS[0]]), sum(TEXTS))


def their_gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the same two documents, each run alone; fused experts taken apart again."""
    total = 0.0
    for seed, length in enumerate(TEXTS):
        text = torch.tensor([prompt(length, seed)])
        loss = torch.nn.functional.cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="sum")
        loss.backward()
        total += loss.item()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if name.endswith("experts.gate_up_proj"):
            for number, both in enumerate(parameter.grad):
                stem = f"{name.removesuffix('gate_up_proj')}{number}"
                gradients[f"{stem}.gate_proj.weight"], gradients[f"{stem}.up_proj.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            gradients |= {f"{name.removesuffix('down_proj')}{number}.down_proj.weight": one for number, one in enumerate(parameter.grad)}
        else:
            gradients[name] = parameter.grad
    return total, gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = written_by_transformers(name, tmp_path / "hf")
    assert theirs.model.config.vocab_size == VOCABULARY
    ours = load_checkpoint(theirs.folder).requires_grad_(True).train()
    loss = NextToken()(ours, packed()).total
    loss.backward()
    told, expected = their_gradients(theirs.model)
    assert loss.item() == pytest.approx(told, rel=1e-5)
    found = {which: parameter.grad for which, parameter in ours.named_parameters() if parameter.grad is not None}
    # An expert that nobody chose has no gradient here and one of zeros there.
    assert {which for which in expected.keys() - found.keys() if expected[which].any()} == set()
    assert found.keys() <= expected.keys()
    assert [which for which in found if not agree(found[which], expected[which], 2e-5)] == []


def test_a_router_that_does_not_learn_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, x: (right(self, x)[0].detach(), right(self, x)[1]))
    with pytest.raises(AssertionError):
        test_loss_and_gradients_are_those_of_transformers("deepseek", tmp_path)
