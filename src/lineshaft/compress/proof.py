"""Proof at export: what was written is the model that went in, rounded as declared, or no artifact appears.

The files are read with nothing of what wrote them: codes are unpacked here once more, by the words of compressed-tensors, and held
against the weights as they were before. So a fault in an encoder, a name or a writer shows, not only one of the disk.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.errors import BadCheckpoint
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf.names import from_file
from lineshaft.model.shards import read_tensors
from lineshaft.ops.formats import Integer

Numbers = npt.NDArray[np.float32]

GOLDEN_TOKENS = 32
"""Of the text on which the model is run before and after."""
ROWS_AT_ONCE = 256
"""Outputs that are unpacked at a time."""
_STEPS = {(8, True): 127.0, (4, True): 7.5, (4, False): 15.0}
"""(bits, symmetric) to steps between zero and the largest weight, or between the least and the largest."""
_NEAREST = 0.52
"""Of a step; half a step is what rounding to nearest costs, the rest is the scale's own rounding to FP16."""
_MEAN = 1.0
"""Of a step, in the root mean square: rounding to nearest leaves 0.29, calibrated rounding up to about twice that; a scale of half its
size, which cuts off all larger weights, 1.4 and more."""
_SMALLEST_SCALE = 2.0**-24


@dataclass(frozen=True)
class Before:
    """A model before it was compressed."""

    tensors: Mapping[str, Tensor]
    """Its state, mapped from disk once more: what changes the model in place does not reach it."""
    golden_TV: Tensor
    """Log-probabilities on the golden text, float32."""


@dataclass(frozen=True)
class Tolerance:
    """How far a compressed model may lie from its source."""

    nats: float
    """Of the next token's chances on the golden text, Kullback-Leibler a token."""
    nearest: bool = True
    """Weights were rounded to the nearest, so none lies further than half a step; else only their root mean square is held to a step."""
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    """Junction to what its channels were divided by, in this order, before weights were rounded."""


def remember(model: Decoder, folder: Path) -> Before:
    """The model, loaded from this folder; to be called before anything is changed."""
    return Before(load_checkpoint(folder).state_dict(), golden(model))


@torch.inference_mode()
def golden(model: Decoder) -> Tensor:
    """Log-probabilities [T, vocabulary] on a text that is the same for every model of this vocabulary."""
    count = min(GOLDEN_TOKENS, model.config.max_position_embeddings)
    tokens_T = torch.arange(1, count + 1) * 7919 % model.config.vocab_size
    return F.log_softmax(model(tokens_T, torch.arange(count), PackedCausal(torch.tensor([0]), count, count)).float(), -1)


def prove(before: Before, model: Decoder, folder: Path, tolerance: Tolerance) -> dict[str, float]:
    """Hold the checkpoint in `folder` against the model as it was, and against `model`, which it was written from.

    Returns what was seen: `largest_error_steps`, how far a weight lies from its source at most, `mean_error_steps`, the largest root
    mean square of a layer, and `golden_nats`, the divergence of the next token on the golden text. Raises BadCheckpoint naming the
    tensor that is missing, too much, or not what it has to be; and where `golden_nats` exceeds what is tolerated.
    """
    error = _hold_against(before.tensors, model, folder, tolerance)  # its view of the files is gone before they are loaded
    read = load_checkpoint(folder)
    _check_state(folder, model, read)
    nats = _divergence(before.golden_TV, golden(read))
    if not nats <= tolerance.nats:
        seen = f"on {len(before.golden_TV)} tokens next-token chances are {nats:.3g} nats from the source's"
        told = f"{seen}, tolerated are {tolerance.nats:g}"
        raise BadCheckpoint(f"{folder}: {told} (proof_nats): take more bits or smaller groups, or skip layers")
    return {name: round(steps, 4) for name, steps in error.items()} | {"golden_nats": float(f"{max(nats, 0.0):.4g}")}


def _hold_against(tensors: Mapping[str, Tensor], model: Decoder, folder: Path, tolerance: Tolerance) -> dict[str, float]:
    """The errors of compressed weights, in steps; everything else must have the bits that it had, or those that scales give it."""
    stored = {from_file(model.config.family, name): tensor for name, tensor in read_tensors(folder).items()}
    coded = {name: linear.format for name, linear in model.linears().items() if isinstance(linear.format, Integer)}
    scaled = _Scaled(model, tolerance.scales)
    largest, mean = [0.0], [0.0]
    for name, given in tensors.items():
        tensor, layer = scaled.meant(name, given), name.removesuffix(".weight")
        if layer in coded and name.endswith(".weight"):
            for found, error in zip((largest, mean), _error(folder, layer, stored, tensor, coded[layer], tolerance.nearest), strict=True):
                found.append(error)
        elif name not in stored:
            raise BadCheckpoint(f"{folder}: {name} was not written; the model would lose it")
        elif not _same(stored[name], tensor):
            raise BadCheckpoint(f"{folder}: {name} is not what it was{'' if tensor is given else ', scaled'}, though it is not compressed")
    return {"largest_error_steps": max(largest), "mean_error_steps": max(mean)} if coded else {}


class _Scaled:
    """What tensors are to be once their junctions are scaled, worked out one at a time: no second model comes into memory."""

    def __init__(self, model: Decoder, scales: Mapping[str, Tensor]) -> None:
        self._of: dict[str, list[tuple[Tensor, bool]]] = defaultdict(list)
        junctions = {junction.name: junction for junction in model.junctions()}
        for name, s_C in scales.items():
            for port in junctions[name].writers:
                self._of[port.module].append((port.spread(s_C), True))
            for port in junctions[name].readers:
                self._of[port.module].append((port.spread(s_C), False))

    def meant(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it is, where no scale concerns it."""
        module, _, part = name.rpartition(".")
        for s_R, written in self._of.get(module, []):
            if part == "weight" and written:
                tensor = (tensor.float() / (s_R[:, None] if tensor.ndim == 2 else s_R)).to(tensor.dtype)
            elif part == "weight":
                tensor = (tensor.float() * s_R).to(tensor.dtype)
            elif part == "bias" and written:
                tensor = (tensor.float() / s_R).to(tensor.dtype)
        return tensor


def _divergence(before_TV: Tensor, after_TV: Tensor) -> float:
    """Kullback-Leibler, nats a token."""
    return float(F.kl_div(after_TV, before_TV, reduction="batchmean", log_target=True))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _check_state(folder: Path, model: Decoder, read: Decoder) -> None:
    """What loads must be the very tensors that were worked out."""
    found = read.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in found or not _same(found[name], tensor):
            raise BadCheckpoint(f"{folder}: {name} does not read back as it was compressed; the disk or the writer is at fault")


def _error(
    folder: Path, layer: str, stored: Mapping[str, Tensor], weight_OI: Tensor, coding: Integer, nearest: bool
) -> tuple[float, float]:
    """How many steps a weight of this layer lies from its source at most, and in the root mean square; steps as its own range allows."""
    parts = {name: stored.get(f"{layer}.{name}") for name in coding.tensor_names}
    if missing := [name for name, tensor in parts.items() if tensor is None]:
        raise BadCheckpoint(f"{folder}: {layer}.{missing[0]} was not written; the layer could not be read")
    tensors = {name: tensor.numpy(force=True) for name, tensor in parts.items() if tensor is not None}
    groups, worst, squares = weight_OI.shape[1] // (coding.group or weight_OI.shape[1]), 0.0, 0.0
    scale = tensors["weight_scale"]
    if scale.shape != (len(weight_OI), groups) or scale.dtype != np.float16:
        told = f"{scale.dtype} {list(scale.shape)}, float16 {[len(weight_OI), groups]} is meant"
        raise BadCheckpoint(f"{folder}: {layer}.weight_scale is {told}")
    for rows, decoded_bGK in _decoded(tensors, weight_OI.shape[1], groups, coding):
        source_bGK = weight_OI[rows].float().numpy(force=True).reshape(decoded_bGK.shape)
        least, largest = source_bGK.min(-1).clip(max=0), source_bGK.max(-1).clip(min=0)
        span = np.maximum(-least, largest) if coding.symmetric else largest - least
        step = np.maximum(span / _STEPS[coding.bits, coding.symmetric], _SMALLEST_SCALE)
        error = np.abs(decoded_bGK - source_bGK) / step[..., None]
        worst, squares = max(worst, float(error.max())), squares + float(np.square(error, dtype=np.float64).sum())
    mean = math.sqrt(squares / weight_OI.numel())
    if nearest and not worst <= _NEAREST:  # nor may it be a NaN
        told = f"a weight lies {worst:.3g} steps from its source, rounding to nearest leaves at most {_NEAREST}"
        raise BadCheckpoint(f"{folder}: {layer}: {told}: codes, scales or names are mixed up")
    if not mean <= _MEAN:
        told = f"weights lie {mean:.3g} steps from their source in the root mean square, tolerated is {_MEAN}"
        raise BadCheckpoint(f"{folder}: {layer}: {told}: codes, scales or names are mixed up, or calibration moved them too far")
    return worst, mean


def _decoded(tensors: Mapping[str, npt.NDArray[np.generic]], inputs: int, groups: int, coding: Integer) -> Iterator[tuple[slice, Numbers]]:
    """Rows, and their weights [rows, G, inputs of a group], as compressed-tensors reads them."""
    scale_OG, middle = tensors["weight_scale"].astype(np.float32), 1 << (coding.bits - 1)
    zero_OG = np.zeros(scale_OG.shape, np.float32)
    if not coding.symmetric:
        zero_OG = (_unpacked(tensors["weight_zero_point"].T, coding.bits).T[: len(scale_OG)] - middle).astype(np.float32)
    for first in range(0, len(scale_OG), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        if coding.packing == "int-quantized":
            codes = tensors["weight"][rows].astype(np.float32)
        else:
            codes = (_unpacked(tensors["weight_packed"][rows], coding.bits)[:, :inputs] - middle).astype(np.float32)
        grouped = codes.reshape(len(codes), groups, -1)
        yield rows, (grouped - zero_OG[rows][..., None]) * scale_OG[rows][..., None]


def _unpacked(words: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.int64]:
    """Codes of int32 words, those in the lowest bits first, along the last axis."""
    shifts = np.arange(0, 32, bits)
    codes: npt.NDArray[np.int64] = words.astype(np.int64)[..., None] >> shifts & ((1 << bits) - 1)
    return codes.reshape(len(words), -1)
