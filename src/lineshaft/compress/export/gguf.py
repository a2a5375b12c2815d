"""GGUF files for llama.cpp: codes and scales of a compressed checkpoint as they are, dense weights as they are.

Format: GGUF version 3, little-endian, written through the `gguf` package of llama.cpp's makers.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineshaft.base.errors import ConfigError, MissingExtra
from lineshaft.base.terminal import bar, say
from lineshaft.compress.export.blocks import Kind, coded_rows, dense_rows, kind_of, kind_of_dense, row_bytes
from lineshaft.compress.export.gguf_metadata import ARCHITECTURES, Value
from lineshaft.compress.export.gguf_names import ROPE_FACTORS, Place, places, turned
from lineshaft.model.config import LatentAttention, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.model.positions import Llama3
from lineshaft.model.rope import speeds
from lineshaft.ops.formats import DENSE

Weights = Mapping[str, Linear | Tensor]

_FILE_TYPES: Mapping[Kind, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers for a file whose weights are mostly of one kind; for people."""
_QUANTISATION_VERSION = 2
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: kind and shape, as numpy has it, before anything is worked out."""

    place: Place
    kind: Kind
    shape: tuple[int, ...]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape with rows in bytes."""
        return (*self.shape[:-1], row_bytes(self.kind, self.shape[-1]))


def package() -> Any:
    """The `gguf` package. Raises MissingExtra."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise MissingExtra("gguf", "export") from None


def weights_of(model: Decoder) -> dict[str, Linear | Tensor]:
    """What the file must hold, by the names of our tensors: a layer for its weight, whatever its format, a tensor for the rest.

    Layers for multi-token prediction are left out, and that is said: answers do not depend on them.
    """
    config, linears = model.config, model.linears()
    coded = {f"{name}.{part}" for name, linear in linears.items() for part in linear.format.tensor_names}
    found: dict[str, Linear | Tensor] = {f"{name}.weight": linear for name, linear in linears.items()}
    found |= {name: tensor for name, tensor in model.state_dict().items() if name not in coded}
    if config.num_nextn_predict_layers:
        say(f"export: {config.num_nextn_predict_layers} multi-token-prediction layers are left out; llama.cpp answers without them")
    further = tuple(f"model.layers.{layer}." for layer in range(config.num_hidden_layers, config.all_layers))
    order = {name: number for number, name in enumerate(model.state_dict())}
    kept = [name for name in found if not (further and name.startswith(further))]
    return {name: found[name] for name in sorted(kept, key=lambda name: (order.get(name, len(order)), name))}


def entries(config: ModelConfig, weights: Weights) -> list[Entry]:
    """Every tensor of the file. Raises ConfigError or UnsupportedModel for what GGUF can't say."""
    found = [_entry(config, place, weights) for place in places(config, weights)]
    if isinstance(config.rope_scaling, Llama3):
        found.append(Entry(Place(ROPE_FACTORS, ()), "F32", (config.rotary_dim // 2,)))
    return found


def _entry(config: ModelConfig, place: Place, weights: Weights) -> Entry:
    first = weights[place.sources[0]]
    if isinstance(first, Tensor):  # norms, biases and routers, which llama.cpp wants in float32, and the embedding
        return Entry(place, kind_of_dense(first) if place.name == _EMBEDDING else "F32", tuple(first.shape))
    kinds = {kind_of(name.removesuffix(".weight"), linear) for name in place.sources if isinstance(linear := weights[name], Linear)}
    if len(kinds) > 1:
        told = f"one layer's experts are stored as {' and '.join(sorted(kinds))}, in GGUF all of them are alike"
        raise ConfigError(f"export: {place.sources[0]}: {told}: compress with one format for experts")
    kind, outputs, inputs = kinds.pop(), first.out_features, first.in_features
    if place.move == "stack":
        return Entry(place, kind, (len(place.sources), outputs, inputs))
    if place.move in ("keys", "values"):
        a = config.attention
        assert isinstance(a, LatentAttention)
        if place.move == "values":
            return Entry(place, kind, (a.num_attention_heads, a.v_head_dim, inputs))
        # Keys lie across the codes' groups, so they are written decoded: exactly, since a code times its FP16 scale fits float32.
        return Entry(place, kind if first.format == DENSE else "F32", (a.num_attention_heads, inputs, a.qk_nope_head_dim))
    return Entry(place, kind, (outputs, inputs))


def write(path: Path, config: ModelConfig, weights: Weights, listed: list[Entry], said: Mapping[str, Value]) -> None:
    """Write the file, one tensor in memory at a time."""
    gguf = package()
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.family])
    try:
        writer.add_file_type(_file_type(listed))
        writer.add_quantization_version(_QUANTISATION_VERSION)
        for key, value in said.items():
            _add(writer, key, value)
        for entry in listed:
            shape = entry.byte_shape
            raw = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.place.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with bar("export", len(listed)) as progress:
            for entry, rows in zip(listed, _all_rows(config, weights, listed), strict=True):
                assert tuple(rows.shape) == entry.byte_shape
                writer.write_tensor_data(rows.numpy(force=True))
                progress.advance()
    finally:
        writer.close()


def _file_type(listed: list[Entry]) -> int:
    """By the kind of most weights in matrices."""
    counts: Counter[Kind] = Counter()
    for entry in listed:
        counts[entry.kind] += int(np.prod(entry.shape)) if len(entry.shape) > 1 else 0
    return _FILE_TYPES[counts.most_common(1)[0][0]]


def _add(writer: Any, key: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _all_rows(config: ModelConfig, weights: Weights, listed: list[Entry]) -> Iterator[Tensor]:
    for entry in listed:
        yield rope_factors(config).view(torch.uint8) if entry.place.name == ROPE_FACTORS else _rows(config, weights, entry)


def rope_factors(config: ModelConfig) -> Tensor:
    """By how much Llama 3.1 slows each rotated pair down, float32 [D / 2]."""
    here = torch.device("cpu")
    return speeds(config.model_copy(update={"rope_scaling": None}), here) / speeds(config, here)


def _rows(config: ModelConfig, weights: Weights, entry: Entry) -> Tensor:
    """The bytes of a tensor of the file, uint8 in `entry.byte_shape`."""
    place, parts = entry.place, [weights[name] for name in entry.place.sources]
    first = parts[0]
    if isinstance(first, Tensor):
        kept = first if place.name == _EMBEDDING else first.float()
        return _moved(config, place, dense_rows(kept[..., None])).flatten(-2)
    if place.move == "stack":
        return torch.stack([_coded(name, linear) for name, linear in zip(place.sources, parts, strict=True) if isinstance(linear, Linear)])
    if place.move in ("keys", "values"):
        return _of_latent(config, entry, first)
    return _moved(config, place, _coded(place.sources[0], first))


def _coded(name: str, linear: Linear) -> Tensor:
    return dense_rows(linear.weight) if linear.format == DENSE else coded_rows(name.removesuffix(".weight"), linear)


def _moved(config: ModelConfig, place: Place, rows_OY: Tensor) -> Tensor:
    if place.move != "rotary" or (how := turned(config, place.sources[0])) is None:
        return rows_OY
    return rows_OY[torch.tensor(how.order())]


def _of_latent(config: ModelConfig, entry: Entry, linear: Linear) -> Tensor:
    """The rows of keys, turned over, or those of values, of each head of kv_b_proj."""
    a = config.attention
    assert isinstance(a, LatentAttention)
    heads = a.num_attention_heads
    if entry.place.move == "values":
        rows_OY = _coded(entry.place.sources[0], linear)
        return rows_OY.view(heads, -1, rows_OY.shape[-1])[:, a.qk_nope_head_dim :]
    dense_OC = linear.weight if linear.format == DENSE else linear.dense_weight(torch.float32)
    keys_HDC = dense_OC.view(heads, -1, linear.in_features)[:, : a.qk_nope_head_dim]
    return dense_rows(keys_HDC.transpose(1, 2))
