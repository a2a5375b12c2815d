"""ONNX files for ONNX Runtime: prompts of small dense models at the edge, proved by running them.

`dynamic_int8` hands a dense graph to onnxruntime's quantize_dynamic, which rounds matrices to INT8, one scale a column, and at run time
what they are multiplied by. A checkpoint that is compressed already keeps its codes instead.

Letters as in onnx_graph.py.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.compress.export.onnx_graph import model_proto, package, refuse
from lineshaft.model.attend import PackedCausal
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import Integer

MOST_BYTES = 2**31 - 2**24
"""A protobuf, which an ONNX file is, ends at 2 GiB; the graph itself takes less than the difference."""
GOLDEN_TOKENS = 32
"""Of the text on which the file is run before it is kept."""
TOLERANCE = 1e-4
"""By which a logit may differ from lineshaft's, as a part of the largest one: another order of float32 sums."""
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""ONNX Runtime's option: 1 multiplies by codes in float32; by default it rounds what meets them to 8 bits."""
DYNAMIC_NATS = 0.1
"""Nats a token by which next-token chances may differ after quantize_dynamic."""


@dataclass(frozen=True)
class Seen:
    """What the file holds, and what it gave when it was run."""

    tensors: int
    kinds: dict[str, int]
    largest_logit_error: float
    """As a part of the largest logit."""
    golden_nats: float
    """Divergence of the next token's chances from lineshaft's, a token."""


def write(path: Path, model: Decoder, dynamic_int8: bool) -> None:
    """Write the file. Raises ConfigError where it would be too large or compressed twice, UnsupportedModel as `onnx_graph`."""
    refuse(model.config)
    coded = any(isinstance(linear.format, Integer) for linear in model.linears().values())
    if dynamic_int8 and coded:
        raise ConfigError("export: dynamic_int8 would round weights that are codes already: leave it out, or export the dense checkpoint")
    size = sum(_bytes(linear) for linear in model.linears().values()) + 4 * model.model.embed_tokens.weight.numel()
    if size > MOST_BYTES:
        raise ConfigError(
            f"export: the weights take {size} bytes, an ONNX file holds {MOST_BYTES}: compress the checkpoint, or take --to gguf"
        )
    proto = model_proto(model)
    package("onnx.checker").check_model(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    if dynamic_int8:
        _round_matrices(path, proto)


def _bytes(linear: Linear) -> int:
    """Of a layer's weight in the file: float32, or codes and float32 scales."""
    outputs, inputs, fmt = linear.out_features, linear.in_features, linear.format
    if not isinstance(fmt, Integer):
        return 4 * outputs * inputs
    return outputs * inputs * fmt.bits // 8 + 5 * outputs * fmt.groups(inputs)


def _round_matrices(path: Path, proto: Any) -> None:
    quantization = package("onnxruntime.quantization")
    matrices = [node.name for node in proto.graph.node if node.op_type == "MatMul" and node.input[1].endswith(".weight")]
    # Codes of 7 bits: without VNNI ONNX Runtime adds pairs of products in 16 bits, which full ones overflow, and says nothing.
    how = {"weight_type": quantization.QuantType.QInt8, "per_channel": True, "reduce_range": True, "nodes_to_quantize": matrices}
    root = logging.getLogger()
    root.addFilter(_without_advice)
    try:
        quantization.quantize_dynamic(path, path, **how)
    finally:
        root.removeFilter(_without_advice)


def _without_advice(record: logging.LogRecord) -> bool:
    """It advises steps for graphs of other makers, in every run."""
    return "pre-processing before quantization" not in record.getMessage()


def prove(path: Path, model: Decoder, dynamic_int8: bool) -> Seen:
    """Read the file back, hold its weights against the checkpoint's, run it on a golden text and hold its logits against lineshaft's.

    Raises BadCheckpoint naming the tensor that differs, or how far logits lie apart.
    """
    proto = package("onnx").load(path)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    if not dynamic_int8:
        for name, linear in model.linears().items():
            _check_weight(name, linear, stored)
    tokens_T = torch.arange(1, min(GOLDEN_TOKENS, model.config.max_position_embeddings) + 1) * 7919 % model.config.vocab_size
    ours_TV, theirs_TV = _ours(model, tokens_T), torch.from_numpy(run(path, tokens_T.numpy()))
    error = float((ours_TV - theirs_TV).abs().max() / ours_TV.abs().max())
    nats = float(F.kl_div(F.log_softmax(theirs_TV, -1), F.log_softmax(ours_TV, -1), reduction="batchmean", log_target=True))
    if not (nats <= DYNAMIC_NATS if dynamic_int8 else error <= TOLERANCE):
        seen = f"{nats:.3g} nats a token, tolerated are {DYNAMIC_NATS}" if dynamic_int8 else f"{error:.3g}, tolerated is {TOLERANCE}"
        raise BadCheckpoint(f"export: on {len(tokens_T)} tokens ONNX Runtime's logits differ from lineshaft's by {seen}; nothing was kept")
    kinds = package("onnx").TensorProto.DataType
    counts = Counter(kinds.Name(tensor.data_type) for tensor in stored.values())
    return Seen(len(stored), dict(sorted(counts.items())), error, nats)


def _check_weight(name: str, linear: Linear, stored: dict[str, Any]) -> None:
    """The weight as ONNX defines DequantizeLinear: (code - zero) * scale, worked out here once more."""
    to_numpy = package("onnx.numpy_helper").to_array
    parts = ("weight",) if not isinstance(linear.format, Integer) else ("codes", "scale", "zeros")
    if lost := [part for part in parts if f"{name}.{part}" not in stored]:
        raise BadCheckpoint(f"export: {name}.{lost[0]} was not written; nothing was kept")
    first, *rest = (np.asarray(to_numpy(stored[f"{name}.{part}"])).astype(np.float32) for part in parts)
    if rest:
        scale, zeros = (np.repeat(np.atleast_2d(part), first.shape[0] // np.atleast_2d(part).shape[0], axis=0) for part in rest)
        first = (first - zeros) * scale
    if not np.array_equal(first.T, linear.dense_weight(torch.float32).numpy(force=True)):
        raise BadCheckpoint(f"export: {name}: the file does not hold the checkpoint's weights; nothing was kept")


@torch.inference_mode()
def _ours(model: Decoder, tokens_T: Tensor) -> Tensor:
    count = len(tokens_T)
    return model(tokens_T, torch.arange(count), PackedCausal(torch.tensor([0]), count, count)).float()


def run(path: Path, tokens_T: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Logits float32 [T, V] of int64 token ids, by ONNX Runtime on the CPU."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.add_session_config_entry(ACCURACY_LEVEL, "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logits: np.ndarray[Any, Any] = session.run(["logits"], {"input_ids": tokens_T[None]})[0][0]
    return logits
