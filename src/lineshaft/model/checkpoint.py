"""Checkpoints: a Hugging Face folder (see `folder`) to a model, and back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lineshaft.base.config import load, merge
from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.base.terminal import say
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.folder import TOKENIZER_FILES, check_artifact, load_config, read_json, write_json
from lineshaft.model.hf.config import to_hf
from lineshaft.model.hf.names import from_file, shared_copies, to_file
from lineshaft.model.linear import Linear
from lineshaft.model.shards import SHARD_BYTES, read_tensors, remove_weights, write_tensors
from lineshaft.ops.formats import DENSE, Format, Integer
from lineshaft.ops.quantization import from_quantization_config, to_quantization_config

T = TypeVar("T")
Tensors = dict[str, Tensor]

_DERIVED = ".rotary_emb.inv_freq"  # old Llama checkpoints store what rope_theta says already
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_EMBEDDING = "model.embed_tokens.weight"


def load_checkpoint(
    folder: Path, *, dtype: torch.dtype | None = None, dequantise: bool = False, active_experts: int | None = None
) -> Decoder:
    """The model in a checkpoint folder, ready to answer: no gradients, weights mapped from disk where they need no cast.

    `dtype`: cast dense weights to it; None keeps what is stored. Quantised tensors and router biases keep theirs.
    `dequantise`: decode quantised layers into dense ones, in `dtype` or the dtype of the dense weights beside them.
    `active_experts`: experts that a token uses, in place of num_experts_per_tok; ConfigError when they are not in reach.
    When the folder is an artifact (it holds a manifest.json) every byte is checked first: Corrupt names file and block.
    Raises BadCheckpoint naming tensors that are missing, unknown, or of the wrong shape or dtype.
    """
    check_artifact(folder)
    config = load_config(folder)
    if active_experts is not None:
        config = _with_active_experts(config, active_experts)
    model, tensors = _matched(folder, config)
    if dtype is not None:  # buffers are quantised tensors and router biases
        tensors |= {name: tensors[name].to(dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(tensors, assign=True)
    _check_one_dtype(folder, model)
    _check_input_scales(folder, model)
    for router in model.routers():
        router.load = torch.zeros(router.load.shape)  # not saved, so still without memory
    if dequantise:
        for linear in model.linears().values():
            linear.dequantise(model.model.embed_tokens.weight.dtype)
    return model.eval().requires_grad_(False)


def _with_active_experts(config: ModelConfig, count: int) -> ModelConfig:
    if config.moe is None:
        raise ConfigError(f"active_experts: {config.family} has no experts to choose from: leave it out")
    return load(ModelConfig, merge(config.model_dump(), {"moe": {"num_experts_per_tok": count}}), where="active_experts")


def _matched(folder: Path, config: ModelConfig) -> tuple[Decoder, Tensors]:
    """The model, hollow, and the tensors for it by our names: all that it needs, nothing else, in the right shapes."""
    stored = read_tensors(folder)
    config = _with_layers_that_are_there(folder, config, stored)
    quantization = read_json(folder, "config.json").get("quantization_config")
    model = _hollow(config, quantization, stored)
    tensors = {from_file(config.family, name): tensor for name, tensor in stored.items() if not name.endswith(_DERIVED)}
    if model.lm_head is None:
        tensors.pop("lm_head.weight", None)  # a tied head that was written out as well
    _drop_copies(folder, config, tensors)
    _check_names(folder, model, tensors)
    _check_fit(folder, model, tensors)
    return model, tensors


def _hollow(config: ModelConfig, quantization: Any, stored: Tensors) -> Decoder:
    """The model with tensors of the right shape and format that take no memory."""
    with torch.device("meta"):
        model = Decoder(config)
        if quantization is not None:
            linears = {to_file(config.family, name): linear for name, linear in model.linears().items()}
            for name, fmt in from_quantization_config(quantization, linears, stored).items():
                _reserve(linears[name], name, fmt)
    return model


def _reserve(linear: Linear, name: str, fmt: Format) -> None:
    try:
        linear.reserve(fmt)
    except ConfigError as error:
        raise BadCheckpoint(f"{name}: {error}") from None


def _with_layers_that_are_there(folder: Path, config: ModelConfig, stored: Tensors) -> ModelConfig:
    """Tools that do not know layers for multi-token prediction lose them and leave config.json as it was.

    Answers do not depend on these layers, so the model is loaded without them, and that is said. Layers that config.json
    does not announce are refused: they would be lost here.
    """
    if not config.family.startswith("deepseek"):
        return config
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    numbers = {int(part) for name in stored if name.startswith("model.layers.") and (part := name.split(".")[2]).isdecimal()}
    if further := sorted(number for number in numbers if number >= first + count):
        told = f"config.json says num_nextn_predict_layers {count}: set it to {further[-1] + 1 - first}, or remove those tensors"
        raise BadCheckpoint(f"{folder}: holds multi-token-prediction layers (model.layers.{further[0]}.*), but {told}")
    if not count or any(number >= first for number in numbers):
        return config
    say(f"{folder}: config.json says num_nextn_predict_layers {count}, but no tensor is of such a layer: the model is loaded without")
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def _drop_copies(folder: Path, config: ModelConfig, tensors: Tensors) -> None:
    """Forget the copies of embedding and head in prediction layers, which are ours once more; ones that differ are refused."""
    for copy, original in shared_copies(config, list(tensors)).items():
        if copy in tensors and not _same_bits(tensors.pop(copy), tensors[original]):
            told = f"prediction layers with an embedding or head of their own are not supported: it differs from {original}"
            raise UnsupportedModel(f"{folder}: {copy}: {told}")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _check_names(folder: Path, model: Decoder, found: Tensors) -> None:
    expected = model.state_dict().keys()
    for what, names in (("missing", expected - found.keys()), ("not part of this model", found.keys() - expected)):
        if names:
            listed = sorted(to_file(model.config.family, name) for name in names)
            shown = ", ".join(listed[:5]) + (" ..." if len(names) > 5 else "")
            if what != "missing" and any(name.endswith((".weight_scale_inv", ".weight_scale", ".weight_packed")) for name in names):
                shown += "; quantised tensors are read as quantization_config in config.json describes them: is it complete?"
            raise BadCheckpoint(f"{folder}: {len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}: {shown}")


def _check_fit(folder: Path, model: Decoder, found: Tensors) -> None:
    for name, want in model.state_dict().items():
        have, theirs = found[name], to_file(model.config.family, name)
        if have.dtype == torch.float8_e8m0fnu:
            raise UnsupportedModel(f"{folder}: {theirs}: scales stored as float8_e8m0fnu (ue8m0) are not supported, only float32")
        if have.shape != want.shape:
            raise BadCheckpoint(f"{folder}: {theirs} has shape {list(have.shape)}, config.json means {list(want.shape)}")
        if have.dtype not in (_FLOATS if want.dtype in _FLOATS else {want.dtype}):
            raise BadCheckpoint(f"{folder}: {theirs} is stored as {have.dtype}, {_complaint(have.dtype, want.dtype)}")


def _complaint(have: torch.dtype, want: torch.dtype) -> str:
    if have == torch.float8_e4m3fn:
        return "but there is no weight_scale_inv beside it, or no quantization_config that says so in config.json"
    return "which is no dtype that we can compute with here" if want in _FLOATS else f"its format means {want}"


def _check_input_scales(folder: Path, model: Decoder) -> None:
    for name, linear in model.linears().items():
        if isinstance(linear.format, Integer):
            try:
                linear.format.input_scale(linear.tensors())
            except BadCheckpoint as error:
                raise BadCheckpoint(f"{folder}: {to_file(model.config.family, name)}: {error}") from None


def _check_one_dtype(folder: Path, model: Decoder) -> None:
    dtypes = _dense_dtypes(model)
    if len(dtypes) > 1:
        shown = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise BadCheckpoint(f"{folder}: dense weights have several dtypes ({shown}): load it with one dtype, such as --dtype float32")


def _dense_dtypes(model: Decoder) -> dict[torch.dtype, str]:
    """Dtype to one of its tensors. Products need both sides in one; norms, routers and scales may have their own."""
    weights = {_EMBEDDING: model.model.embed_tokens.weight}
    weights |= {name: linear.weight for name, linear in model.linears().items() if linear.format == DENSE}
    return {weight.dtype: name for name, weight in weights.items()}


def save_checkpoint(model: Decoder, folder: Path, tokenizer_from: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model as a Hugging Face folder, with the tokenizer files of another folder beside it.

    Weights go into one file, or into several of at most `shard_bytes` bytes. A checkpoint that was there is removed first
    and config.json is written last, so a folder that was not finished can't be loaded. Raises ConfigError for dense
    weights of several dtypes, or FP8 layers beside integers.
    """
    dtypes = sorted(map(str, _dense_dtypes(model)))
    if len(dtypes) != 1:
        raise ConfigError(f"all dense weights of a checkpoint must have one dtype, found {dtypes}")
    hf = to_hf(model.config, dtypes[0].removeprefix("torch."))
    quantization = to_quantization_config(_formats(model))
    if quantization is not None:
        hf["quantization_config"] = quantization
    folder.mkdir(parents=True, exist_ok=True)
    remove_weights(folder)
    write_tensors(folder, _for_file(model.config, model.state_dict()), shard_bytes)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).exists() and not tokenizer_from.samefile(folder):
            shutil.copyfile(tokenizer_from / name, folder / name)
    write_json(folder / "generation_config.json", {name: hf[name] for name in ("bos_token_id", "eos_token_id")})
    write_json(folder / "config.json", hf)


def _formats(model: Decoder) -> dict[str, Format]:
    """The format of every module that other tools might take for a linear layer, by its name in the files."""
    matrices = {name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.ndim == 2}
    matrices = matrices - {_EMBEDDING.removesuffix(".weight")} | {"lm_head"}  # other tools have a tied head as a layer, too
    formats: dict[str, Format] = dict.fromkeys(matrices, DENSE)
    return _for_file(model.config, formats | {name: linear.format for name, linear in model.linears().items()})


def _for_file(config: ModelConfig, ours: Mapping[str, T]) -> dict[str, T]:
    """By their names in the files, and again under the names of their copies."""
    copies = {copy: ours[original] for copy, original in shared_copies(config, ours).items()}
    return {to_file(config.family, name): item for name, item in {**ours, **copies}.items()}


def quantised_share_of_fp32(model: Decoder) -> float | None:
    """Bytes of the quantised layers' tensors over the bytes of the same weights in FP32; None when all are dense."""
    layers = [linear for linear in model.linears().values() if linear.format != DENSE]
    if not layers:
        return None
    stored = sum(tensor.nbytes for linear in layers for tensor in linear.tensors().values())
    return stored / sum(4 * linear.in_features * linear.out_features for linear in layers)
