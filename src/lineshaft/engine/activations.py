"""Activations that an engine rounds to 8 bits although its checkpoint does not say so: prompts then run at the rate of 8-bit products."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain

from lineshaft.base.errors import ConfigError
from lineshaft.engine.config import EngineConfig
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import Integer
from lineshaft.ops.packed import Packed


def rounding(model: Decoder, config: EngineConfig) -> Decoder:
    """The model as `config.activations` wants it, sharing its tensors with the one given, or that one where nothing changes.

    Every product with integer weights rounds its activations, a scale a token (`ops/integers.py`, `rounded`), but for the output
    projection's: it reads one token a request, and ties between the best tokens hang on it.
    Raises ConfigError where the weights of no layer are integers.
    """
    formats = [linear.format for linear in model.linears().values()]
    if config.activations == "auto" or any(isinstance(fmt, Packed) and fmt.whole for fmt in formats):
        return model
    if not any(isinstance(fmt, Integer) for fmt in formats):
        raise ConfigError("engine.activations=int8: no layer has integer weights (engine.dequantise decodes them); leave it at auto")
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    own: Decoder = copy.deepcopy(model, shared)
    for linear in own.linears().values():
        if linear is not own.lm_head and isinstance(linear.format, Integer):
            linear.format = replace(linear.format, activations=linear.format.activations or "int8")
    return own


def told(model: Decoder) -> str:
    """For whoever starts the server: how many products round although the checkpoint did not ask for it."""
    formats = [linear.format for linear in model.linears().values()]
    count = sum(fmt.whole if isinstance(fmt, Packed) else isinstance(fmt, Integer) and fmt.activations is not None for fmt in formats)
    return f"activations are rounded to 8 bits in {count} of {len(formats)} products, as engine.activations says"
