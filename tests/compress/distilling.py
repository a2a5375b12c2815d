"""A teacher and students in miniature, and the loss worked out by hand in float64; for the tests of distillation."""

from __future__ import annotations

from typing import Any

import letter_line
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lineshaft.compress.distil_stage import DistilConfig
from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import Architecture, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.rope import rotation
from lineshaft.train.batches import IGNORE, Batch

Floats = npt.NDArray[np.float64]
GQA = {"kind": "gqa", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}


def shape(layers: int, width: int = 12) -> Architecture:
    """Of a small llama."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width, "max_position_embeddings": 64}
    return Architecture.model_validate({"family": "llama", **sizes, "attention": GQA})


def model_of(architecture: Architecture, seed: int) -> Decoder:
    """With fresh weights, large enough that its chances are not all alike."""
    told = {"vocab_size": letter_line.VOCABULARY, "initializer_range": 0.4}
    model = Decoder(ModelConfig.model_validate(architecture.model_dump() | told))
    model.initialise(seed)
    return model


def config(**changes: Any) -> DistilConfig:
    """A run like letter_line's: 12 short steps, states after 4 and 8."""
    same = letter_line.config(**{name: changes.pop(name) for name in list(changes) if name not in DistilConfig.model_fields})
    return DistilConfig.model_validate(same.model_dump(exclude={"model"}) | changes)


def row_of(documents: list[list[int]]) -> Batch:
    """Whole documents in one row; the last token of each has nothing to predict."""
    starts = torch.tensor([sum(map(len, documents[:number])) for number in range(len(documents))])
    tokens = torch.tensor([token for document in documents for token in document])
    targets = torch.tensor([token for document in documents for token in [*document[1:], IGNORE]])
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    return Batch(tokens, positions, targets, starts, len(tokens))


def layer_by_layer(model: Decoder, document: list[int]) -> tuple[Floats, list[Floats]]:
    """Logits of one document alone, and what each layer gives."""
    tokens, positions, attend = torch.tensor(document), torch.arange(len(document)), PackedCausal([0], len(document))
    x, found = model.model.embed_tokens(tokens), []
    for layer in model.model.layers[: model.config.num_hidden_layers]:
        x = layer(x, rotation(model.config, positions), attend)
        found.append(wide(x))
    return wide(model.logits(model.model.norm(x))), found


def wide(tensor: Tensor) -> Floats:
    """As numpy's float64."""
    return tensor.detach().double().numpy()


def chances(logits: Floats, temperature: float) -> Floats:
    """Softmax at a temperature."""
    grown = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return grown / grown.sum(-1, keepdims=True)
