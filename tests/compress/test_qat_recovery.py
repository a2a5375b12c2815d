"""What quantisation-aware training is for: less of the model is lost than by training as long and rounding then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import letter_line
import torch

from lineshaft.base.store import Draft
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.qat_stage import QAT, QatConfig, heldout_loss
from lineshaft.compress.stage import COMPRESS
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.junction import scale
from lineshaft.records.tokens import TokenStream
from lineshaft.train.finetune import FINETUNE, FinetuneConfig
from lineshaft.train.optimiser import OptimiserConfig
from lineshaft.train.stage import PRETRAIN, TrainConfig

SMALL_LLAMA = {
    "family": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "attention": {"kind": "gqa", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}


def test_it_recovers_more_than_half_of_what_4_bits_cost_a_model_trained_as_long(tmp_path: Path) -> None:
    """Channels of very unlike sizes, which cost rounding much and the model nothing (junctions), are what training has to deal with."""
    store, parents = letter_line.parents(tmp_path)
    tokens, heldout = parents["tokens"], TokenStream(parents["tokens"], "heldout")
    even = PRETRAIN(store, fast(150, 2e-2, model=SMALL_LLAMA), **parents)
    model, luck = load_checkpoint(even.root), torch.Generator().manual_seed(1)
    for junction in model.junctions():
        scale(model, junction, (1.5 * torch.randn(junction.channels, generator=luck)).exp())
    with store.draft("checkpoint", stage="by_hand", version=1, config={}, parents={"checkpoint": even}) as draft:
        assert isinstance(draft, Draft)
        save_checkpoint(model, draft.root, even.root)
    dense = store.open(draft.root.parent.name)
    budget = fast(40, 2e-3).model_dump(exclude={"model"})
    control = FINETUNE(store, FinetuneConfig.model_validate(budget), checkpoint=dense, tokens=tokens)
    rounded = COMPRESS(store, CompressConfig(format="int4", proof_nats=9.0), checkpoint=control)
    trained = QAT(store, QatConfig.model_validate(budget), checkpoint=dense, tokens=tokens)
    least, ours, most = (heldout_loss(load_checkpoint(made.root), heldout, fast(1, 1e-3)) for made in (control, trained, rounded))
    assert most - least > 0.1
    assert most - ours > 0.5 * (most - least)


def fast(steps: int, peak_lr: float, **changes: Any) -> TrainConfig:
    own = {"steps": steps, "save_every": steps, "log_every": steps, "optimiser": OptimiserConfig(peak_lr=peak_lr)}
    return letter_line.config(rows=8, **own, **changes)
