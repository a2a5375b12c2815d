"""Proof at export: the written file holds the checkpoint's weights, bit for bit, or it goes.

The file is read with the `gguf` package and decoded here once more, by the words of ggml-common.h and with nothing of what wrote it. The
weights then go back to where they stood in the checkpoint, and are held against what lineshaft multiplies by.

Letters as in blocks.py; H heads, R pairs of rotated channels, C width of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lineshaft.base.errors import BadCheckpoint
from lineshaft.compress.export.gguf import Entry, Weights, package, rope_factors
from lineshaft.compress.export.gguf_metadata import Value
from lineshaft.compress.export.gguf_names import ROPE_FACTORS, turned
from lineshaft.model.config import LatentAttention, ModelConfig
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import Integer

Numbers = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_HALF_STEP = 2.0**-11
"""Of a number: what rounding it to FP16 changes at most."""
_HALF_SMALLEST = 2.0**-25
"""The same below FP16's normal numbers."""


@dataclass(frozen=True)
class Proof:
    """What was seen."""

    tensors: int
    offset_error_steps: float
    """How far a weight of a Q4_1 block lies from the checkpoint's at most, in steps; 0 where there is none."""


def prove(path: Path, config: ModelConfig, weights: Weights, listed: list[Entry], said: Mapping[str, Value]) -> Proof:
    """Hold the file against the checkpoint's weights. Raises BadCheckpoint naming the tensor or key that is not what it has to be."""
    reader = package().GGUFReader(path)
    _check_metadata(reader, said)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    wanted = [entry.place.name for entry in listed]
    if lost := sorted(set(wanted) ^ stored.keys()):
        raise BadCheckpoint(f"export: {lost[0]}: was not written, or is not of this model; nothing was kept")
    errors = [0.0]
    for entry in listed:
        name, found = entry.place.name, stored[entry.place.name]
        decoded = _decoded(found.tensor_type.name, np.ascontiguousarray(found.data).view(np.uint8).reshape(-1))
        if tuple(reversed(found.shape.tolist())) != entry.shape or decoded.size != np.prod(entry.shape):
            raise BadCheckpoint(f"export: {name}: has shape {found.shape.tolist()}, which is not the model's; nothing was kept")
        errors.append(_held(config, weights, entry, decoded.reshape(entry.shape)))
    return Proof(len(listed), max(errors))


def _check_metadata(reader: Any, said: Mapping[str, Value]) -> None:
    for key, value in said.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        same = np.float32(value) == found if isinstance(value, float) else value == found
        if not same:
            raise BadCheckpoint(f"export: {key}: does not read back as it was written; the disk or the writer is at fault")


def _decoded(kind: str, data_Y: Bytes) -> Numbers:
    """The weights of a tensor, one after another, as ggml reads its bytes."""
    match kind:
        case "F32":
            return data_Y.view(np.float32)
        case "F16":
            return data_Y.view(np.float16).astype(np.float32)
        case "BF16":
            return (data_Y.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "Q8_0":
            block_NY = data_Y.reshape(-1, 34)
            return (_half(block_NY, 0) * block_NY[:, 2:].view(np.int8).astype(np.float32)).reshape(-1)
        case "Q4_0":
            block_NY = data_Y.reshape(-1, 18)
            return (_half(block_NY, 0) * (_nibbles(block_NY[:, 2:]) - np.float32(8))).reshape(-1)
        case "Q4_1":
            block_NY = data_Y.reshape(-1, 20)
            return (_half(block_NY, 0) * _nibbles(block_NY[:, 4:]) + _half(block_NY, 2)).reshape(-1)
    raise BadCheckpoint(f"export: a tensor is of kind {kind}, which is never written")


def _half(block_NY: Bytes, at: int) -> Numbers:
    return np.ascontiguousarray(block_NY[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed_NY: Bytes) -> Numbers:
    return np.concatenate([packed_NY % 16, packed_NY // 16], axis=1).astype(np.float32)


def _held(config: ModelConfig, weights: Weights, entry: Entry, found: Numbers) -> float:
    """Compare a tensor with its sources; the error of offsets, in steps."""
    if entry.place.name == ROPE_FACTORS:
        _check_bits(entry.place.name, found, rope_factors(config).numpy())
        return 0.0
    errors = [0.0]
    for number, name in enumerate(entry.place.sources):
        part = _put_back(config, entry, name, found[number] if entry.place.move == "stack" else found)
        source = weights[name]
        meant = source.dense_weight(torch.float32) if isinstance(source, Linear) else source.float()
        meant_np: Numbers = _part_of(config, entry, meant).numpy(force=True)
        if entry.kind == "Q4_1" and isinstance(source, Linear):
            errors.append(_offset_error(config, entry, source, part - meant_np))
        else:
            _check_bits(f"{entry.place.name} ({name})", part, meant_np)
    return max(errors)


def _put_back(config: ModelConfig, entry: Entry, name: str, found: Numbers) -> Numbers:
    """Rows in the order of the checkpoint. Neighbours [R, 2] become halves [2, R] in the rotated part of each head."""
    how = turned(config, name) if entry.place.move == "rotary" else None
    if how is None:
        return found
    head = found.reshape(how.heads, how.still + how.turned, -1)
    still, moved = head[:, : how.still], head[:, how.still :]
    halves = moved.reshape(how.heads, how.turned // 2, 2, -1).swapaxes(1, 2).reshape(moved.shape)
    return np.concatenate([still, halves], axis=1).reshape(found.shape)


def _part_of(config: ModelConfig, entry: Entry, meant: Tensor) -> Tensor:
    """What of a weight the file's tensor should hold: of kv_b_proj the keys, turned over, or the values."""
    a = config.attention
    if entry.place.move not in ("keys", "values") or not isinstance(a, LatentAttention):
        return meant
    head_HOC = meant.reshape(a.num_attention_heads, a.qk_nope_head_dim + a.v_head_dim, a.kv_lora_rank)
    return head_HOC[:, : -a.v_head_dim].permute(0, 2, 1) if entry.place.move == "keys" else head_HOC[:, -a.v_head_dim :]


def _check_bits(name: str, found: Numbers, meant: Numbers) -> None:
    if found.shape != meant.shape or not np.array_equal(found.view(np.int32), np.ascontiguousarray(meant).view(np.int32)):
        raise BadCheckpoint(f"export: {name}: the file does not hold the checkpoint's weights; nothing was kept")


def _offset_error(config: ModelConfig, entry: Entry, source: Linear, apart: Numbers) -> float:
    """The largest error of a weight, in steps, each within what rounding its block's offset to FP16 may change."""
    assert isinstance(source.format, Integer)
    integers = source.format.integers(source.tensors())
    width = source.in_features // integers.scale_OG.shape[1]
    tables = (table_OG.float().repeat_interleave(width, 1) for table_OG in (integers.scale_OG, integers.zero_OG))
    scale, zero = (_part_of(config, entry, table_OI).numpy(force=True) for table_OI in tables)
    offset = scale * zero
    # The sum d q + m is rounded to float32 as well, by less than a part in 2^23 of its larger term.
    most = np.maximum(offset * _HALF_STEP, _HALF_SMALLEST) + (15 * scale + offset) * 2.0**-23
    if not (np.abs(apart) <= most).all():
        told = "a weight lies further from the checkpoint's than rounding an offset to FP16 explains"
        raise BadCheckpoint(f"export: {entry.place.name}: {told}; nothing was kept")
    return float((np.abs(apart) / scale).max())
