"""The graph of a dense decoder in ONNX operators: a prompt of any length in, logits of all its tokens out, everything in float32.

Coded layers stay codes: their weights are DequantizeLinear of the very codes, scales and zero points of the checkpoint.

Letters: T tokens, I a layer's inputs, O its outputs, G groups of inputs, H query heads, K key heads, Q query heads a key head,
D channels of a head, R rotated pairs, V vocabulary.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lineshaft.base.errors import MissingExtra, UnsupportedModel
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.model.positions import Dynamic, Yarn
from lineshaft.model.rope import speeds
from lineshaft.ops.formats import Integer
from lineshaft.ops.reach import Causal, Reach, Window

OPSET = 21
"""The first with scales for groups of inputs, and with 4-bit numbers."""
IR_VERSION = 10
"""That of the first onnx release with this opset."""

Array = npt.NDArray[Any]


def package(name: str) -> Any:
    """`onnx`, `onnxruntime` or a module of theirs. Raises MissingExtra."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtra(name.partition(".")[0], "onnx") from None


@dataclass
class _Graph:
    """Nodes and constants as they are added. Every method gives the name of what it made."""

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._helper, self._from_numpy = package("onnx.helper"), package("onnx.numpy_helper").from_array

    def add(self, op: str, *inputs: str, called: str | None = None, **attributes: Any) -> str:
        """A node of one output."""
        name = called or f"{op}_{len(self.nodes)}"
        self.nodes.append(self._helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Array) -> str:
        """A tensor of the file; the same one where the name is there already."""
        self.constants.setdefault(name, self._from_numpy(np.ascontiguousarray(value), name))
        return name

    def four_bits(self, name: str, codes: Array) -> str:
        """A tensor of UINT4, two codes a byte, the first in the low half."""
        flat = codes.flatten()
        if len(flat) % 2:
            flat = np.append(flat, np.uint8(0))
        packed = (flat[0::2] | flat[1::2] << 4).tobytes()
        kind = package("onnx").TensorProto.UINT4
        self.constants[name] = self._helper.make_tensor(name, kind, codes.shape, packed, raw=True)
        return name

    def ints(self, *values: int) -> str:
        """int64 [n], such as a shape."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(f"number_{value!r}", np.array(value, np.float32))


def model_proto(model: Decoder) -> Any:
    """The whole model: input_ids int64 [1, T] to logits float32 [1, T, V]. Raises UnsupportedModel for what is not a dense decoder."""
    config = model.config
    refuse(config)
    graph = _Graph()
    ids_T = graph.add("Squeeze", "input_ids", graph.ints(0))
    tokens = graph.add("Shape", ids_T)
    zero, one = (graph.constant(name, np.array(value, np.int64)) for name, value in (("zero", 0), ("one", 1)))
    place_T = graph.add("Range", zero, graph.add("Squeeze", tokens), one)
    turn = _angles(graph, config, place_T)
    reaches = dict.fromkeys(config.reach_of(layer) for layer in range(config.num_hidden_layers))
    masks = {reach: _mask(graph, reach, place_T) for reach in reaches}
    table = graph.constant("model.embed_tokens.weight", _numpy(model.model.embed_tokens.weight))
    x_TI = graph.add("Gather", table, ids_T)
    for layer in range(config.num_hidden_layers):
        x_TI = _layer(graph, model, f"model.layers.{layer}", x_TI, turn, masks[config.reach_of(layer)])
    x_TI = _norm(graph, model, "model.norm", x_TI)
    head = _linear(graph, model, "lm_head", x_TI) if model.lm_head is not None else graph.add("MatMul", x_TI, graph.add("Transpose", table))
    graph.add("Unsqueeze", head, graph.ints(0), called="logits")
    return _proto(graph, config)


def _proto(graph: _Graph, config: ModelConfig) -> Any:
    helper, kinds = package("onnx.helper"), package("onnx").TensorProto
    ids = helper.make_tensor_value_info("input_ids", kinds.INT64, [1, "tokens"])
    logits = helper.make_tensor_value_info("logits", kinds.FLOAT, [1, "tokens", config.vocab_size])
    made = helper.make_graph(graph.nodes, "prefill", [ids], [logits], list(graph.constants.values()))
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="lineshaft")
    said = {"model_type": config.family, "max_position_embeddings": config.max_position_embeddings, "eos_token_id": config.eos_token_ids}
    helper.set_model_props(proto, {name: str(value) for name, value in said.items()})
    return proto


def refuse(config: ModelConfig) -> None:
    """Raises UnsupportedModel, naming what the graph has no operators for."""
    wanted = {
        "latent attention": not isinstance(config.attention, GroupedQueryAttention),
        "experts": config.moe is not None,
        "rope scaling dynamic, whose angles depend on the length of the text": isinstance(config.rope_scaling, Dynamic),
        "attention by blocks": any(not isinstance(reach, Causal | Window) for reach in config.reach),
    }
    for what, present in wanted.items():
        if present:
            raise UnsupportedModel(
                f"export: {config.family}: {what}: exports to ONNX are of dense models; take --to gguf, or serve it here"
            )


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().float().numpy(force=True)


def _angles(graph: _Graph, config: ModelConfig, place_T: str) -> tuple[str, str]:
    """Cosine and sine of position * speed, [T, 1, R], as `ops.reference.angles`."""
    kind = package("onnx").TensorProto.FLOAT
    position_T1 = graph.add("Unsqueeze", graph.add("Cast", place_T, to=kind), graph.ints(1, 2))
    angle = graph.add("Mul", position_T1, graph.constant("speeds", speeds(config, torch.device("cpu")).numpy()))
    parts = graph.add("Cos", angle), graph.add("Sin", angle)
    if not isinstance(config.rope_scaling, Yarn) or config.rope_scaling.length == 1:
        return parts
    length = graph.number(config.rope_scaling.length)
    return graph.add("Mul", parts[0], length), graph.add("Mul", parts[1], length)


def _mask(graph: _Graph, reach: Reach, place_T: str) -> str:
    """What is added to scores [T, T]: 0 where a token sees another, minus infinity elsewhere."""
    q_T1, k_1T = graph.add("Unsqueeze", place_T, graph.ints(1)), graph.add("Unsqueeze", place_T, graph.ints(0))
    seen = graph.add("LessOrEqual", k_1T, q_T1)
    if isinstance(reach, Window):
        near = graph.add("Less", graph.add("Sub", q_T1, k_1T), graph.ints(reach.window))
        near = graph.add("Or", near, graph.add("Less", k_1T, graph.ints(reach.global_tokens)))
        seen = graph.add("And", seen, near)
    return graph.add("Where", seen, graph.number(0.0), graph.number(float("-inf")))


def _layer(graph: _Graph, model: Decoder, name: str, x_TI: str, turn: tuple[str, str], mask: str) -> str:
    attended = _attention(graph, model, f"{name}.self_attn", _norm(graph, model, f"{name}.input_layernorm", x_TI), turn, mask)
    x_TI = graph.add("Add", x_TI, attended)
    y_TI = _norm(graph, model, f"{name}.post_attention_layernorm", x_TI)
    gate, up = (_linear(graph, model, f"{name}.mlp.{part}_proj", y_TI) for part in ("gate", "up"))
    gated = graph.add("Mul", graph.add("Mul", gate, graph.add("Sigmoid", gate)), up)
    return graph.add("Add", x_TI, _linear(graph, model, f"{name}.mlp.down_proj", gated))


def _attention(graph: _Graph, model: Decoder, name: str, x_TI: str, turn: tuple[str, str], mask: str) -> str:
    a = model.config.attention
    assert isinstance(a, GroupedQueryAttention)
    keys, width, queries = a.num_key_value_heads, a.head_dim, a.num_attention_heads // a.num_key_value_heads
    heads = {}
    for part in ("q", "k", "v"):
        projected = _linear(graph, model, f"{name}.{part}_proj", x_TI)
        heads[part] = graph.add("Reshape", projected, graph.ints(0, -1, width))
        if part != "v":
            normed = _norm(graph, model, f"{name}.{part}_norm", heads[part]) if a.qk_norm else heads[part]
            heads[part] = _turned(graph, normed, turn, width)
    q_TKQD = graph.add("Reshape", heads["q"], graph.ints(0, keys, queries, width))
    q_KQTD = graph.add("Transpose", q_TKQD, perm=[1, 2, 0, 3])
    k_K1DT = graph.add("Unsqueeze", graph.add("Transpose", heads["k"], perm=[1, 2, 0]), graph.ints(1))
    v_K1TD = graph.add("Unsqueeze", graph.add("Transpose", heads["v"], perm=[1, 0, 2]), graph.ints(1))
    scores = graph.add("Mul", graph.add("MatMul", q_KQTD, k_K1DT), graph.number(width**-0.5))
    shares = graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)
    mixed_TKQD = graph.add("Transpose", graph.add("MatMul", shares, v_K1TD), perm=[2, 0, 1, 3])
    return _linear(graph, model, f"{name}.o_proj", graph.add("Reshape", mixed_TKQD, graph.ints(0, keys * queries * width)))


def _turned(graph: _Graph, x_THD: str, turn: tuple[str, str], width: int) -> str:
    """Halves of each head turned by their angles, as `ops.reference.rope`."""
    cos, sin = turn
    a, b = (graph.add("Slice", x_THD, graph.ints(first), graph.ints(first + width // 2), graph.ints(2)) for first in (0, width // 2))
    first = graph.add("Sub", graph.add("Mul", a, cos), graph.add("Mul", b, sin))
    second = graph.add("Add", graph.add("Mul", b, cos), graph.add("Mul", a, sin))
    return graph.add("Concat", first, second, axis=-1)


def _norm(graph: _Graph, model: Decoder, name: str, x: str) -> str:
    part: Any = model.get_submodule(name)
    mean = graph.add("ReduceMean", graph.add("Mul", x, x), graph.ints(-1), keepdims=1)
    root = graph.add("Sqrt", graph.add("Add", mean, graph.number(part.eps)))
    return graph.add("Mul", graph.add("Div", x, root), graph.constant(f"{name}.weight", _numpy(part.weight)))


def _linear(graph: _Graph, model: Decoder, name: str, x_TI: str) -> str:
    linear = model.get_submodule(name)
    assert isinstance(linear, Linear)
    y_TO = graph.add("MatMul", x_TI, _weight(graph, linear, name))
    return y_TO if linear.bias is None else graph.add("Add", y_TO, graph.constant(f"{name}.bias", _numpy(linear.bias)))


def _weight(graph: _Graph, linear: Linear, name: str) -> str:
    """The weight [I, O], as MatMul takes it: dense numbers, or codes with their scales."""
    fmt = linear.format
    if not isinstance(fmt, Integer):
        return graph.constant(f"{name}.weight", _numpy(linear.dense_weight(torch.float32).T))
    found = fmt.integers(linear.tensors())
    codes_IO, scale_GO, zero_GO = (table.numpy(force=True).T for table in (found.codes_OI, found.scale_OG, found.zero_OG))
    if fmt.bits == 8:
        codes = graph.constant(f"{name}.codes", codes_IO)
        zeros = graph.constant(f"{name}.zeros", zero_GO if fmt.group else zero_GO[0])
    else:
        codes = graph.four_bits(f"{name}.codes", codes_IO)
        zeros = graph.four_bits(f"{name}.zeros", zero_GO if fmt.group else zero_GO[0])
    scale = graph.constant(f"{name}.scale", scale_GO if fmt.group else scale_GO[0])
    how: dict[str, Any] = {"axis": 0, "block_size": fmt.group} if fmt.group else {"axis": 1}
    return graph.add("DequantizeLinear", codes, scale, zeros, **how)
