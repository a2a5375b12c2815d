"""Checkpoints: a plain Hugging Face folder in, the same out.

    config.json              what the model is, and its `quantization_config` when compressed
    model.safetensors        the weights (or shards with model.safetensors.index.json; read, not yet written)
    generation_config.json   which tokens end an answer
    tokenizer.json, ...      carried along untouched
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lineshaft.base import manifest
from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.base.files import is_inside
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf import from_hf, to_hf
from lineshaft.model.linear import Linear
from lineshaft.ops.formats import DENSE, Format, from_compressed_tensors, to_compressed_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_DERIVED = ".rotary_emb.inv_freq"  # old Llama checkpoints store what rope_theta says already
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises BadCheckpoint when it is missing or broken."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{folder}: no {name} here; a checkpoint is a Hugging Face folder with config.json and safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{folder / name}: can't be read: {error}") from None
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{folder / name}: expected a JSON object")
    return content


def load_config(folder: Path) -> ModelConfig:
    """The description of the model in a checkpoint folder; generation_config.json's end tokens win over config.json's."""
    hf = read_json(folder, "config.json")
    if (folder / "generation_config.json").exists():
        eos = read_json(folder, "generation_config.json").get("eos_token_id")
        hf |= {} if eos is None else {"eos_token_id": eos}
    return from_hf(hf)


def load_checkpoint(folder: Path, *, dtype: torch.dtype | None = None) -> Decoder:
    """The model in a checkpoint folder, ready to answer: no gradients, weights mapped from disk where they need no cast.

    `dtype`: cast dense weights to it; None keeps what is stored. Quantised tensors and router biases keep theirs.
    When the folder is an artifact (it holds a manifest.json) every byte is checked first: Corrupt names file and block.
    Raises BadCheckpoint naming tensors that are missing, unknown, or of the wrong shape or dtype.
    """
    check_artifact(folder)
    model = _hollow(load_config(folder), read_json(folder, "config.json").get("quantization_config"))
    tensors = {name: tensor for name, tensor in _tensors(folder) if not name.endswith(_DERIVED)}
    if model.lm_head is None:
        tensors.pop("lm_head.weight", None)  # a tied head that was written out as well
    _check_names(folder, model, tensors)
    _check_fit(folder, model.state_dict(), tensors)
    model.load_state_dict({name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}, assign=True)
    _check_one_dtype(folder, model)
    for router in model.routers():
        router.load = torch.zeros(router.load.shape)  # not saved, so still without memory
    return model.eval().requires_grad_(False)


def check_artifact(folder: Path) -> None:
    """When the folder is an artifact, read every byte against its manifest. Raises Corrupt naming file and block."""
    if not (folder / manifest.FILE_NAME).exists():
        return
    found = manifest.read(folder)
    if found.kind != "checkpoint":
        raise BadCheckpoint(f"{folder}: is an artifact of kind {found.kind}, not a checkpoint")
    manifest.check_files(folder, found)


def _hollow(config: ModelConfig, quantization: dict[str, Any] | None) -> Decoder:
    """The model with tensors of the right shape and format that take no memory."""
    with torch.device("meta"):
        model = Decoder(config)
        if quantization is not None:
            linears = model.linears()
            for name, fmt in from_compressed_tensors(quantization, linears).items():
                _reserve(linears[name], name, fmt)
    return model


def _reserve(linear: Linear, name: str, fmt: Format) -> None:
    try:
        linear.reserve(fmt)
    except ConfigError as error:
        raise BadCheckpoint(f"{name}: {error}") from None


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files: the one, or the shards that the index names."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [WEIGHTS]
    listed = read_json(folder, INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise BadCheckpoint(f"{folder / INDEX}: weight_map must name the file of each tensor")
    for name in listed.values():
        if "/" in name or not is_inside(name):
            raise BadCheckpoint(f"{folder / INDEX}: names a file outside the folder: {name}")
    return sorted(set(listed.values()))


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name in _weight_files(folder):
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"{folder / name}: can't be read as safetensors: {error}") from None


def _check_names(folder: Path, model: Decoder, found: dict[str, Tensor]) -> None:
    prediction = f"model.layers.{model.config.num_hidden_layers}."
    if model.config.family == "deepseek_v3" and any(name.startswith(prediction) for name in found):
        raise UnsupportedModel(f"{folder}: holds multi-token-prediction layers ({prediction}*), which are not supported yet")
    expected = model.state_dict().keys()
    for what, names in (("missing", expected - found.keys()), ("not part of this model", found.keys() - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise BadCheckpoint(f"{folder}: {len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}: {shown}")


def _check_fit(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, want in expected.items():
        have = found[name]
        if have.shape != want.shape:
            raise BadCheckpoint(f"{folder}: {name} has shape {list(have.shape)}, config.json means {list(want.shape)}")
        if have.dtype not in (_FLOATS if want.is_floating_point() else {want.dtype}):
            raise BadCheckpoint(f"{folder}: {name} is stored as {have.dtype}, which is no dtype that we can compute with here")


def _check_one_dtype(folder: Path, model: Decoder) -> None:
    """Products need both sides in one dtype; norms, routers and scales may have their own."""
    weights = {"model.embed_tokens": model.model.embed_tokens.weight}
    weights |= {name: linear.weight for name, linear in model.linears().items() if linear.format == DENSE}
    dtypes = {weight.dtype: name for name, weight in weights.items()}
    if len(dtypes) > 1:
        shown = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise BadCheckpoint(f"{folder}: dense weights have several dtypes ({shown}): load it with one dtype, such as --dtype float32")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    keeps = name.endswith(("e_score_correction_bias", "weight_scale")) or not tensor.is_floating_point()
    return tensor if dtype is None or keeps else tensor.to(dtype)


def save_checkpoint(model: Decoder, folder: Path, tokenizer_from: Path) -> None:
    """Write the model as a Hugging Face folder, with the tokenizer files of another folder beside it."""
    dense = {parameter.dtype for parameter in model.parameters()}
    if len(dense) != 1:
        raise ConfigError(f"all dense weights of a checkpoint must have one dtype, found {sorted(map(str, dense))}")
    hf = to_hf(model.config, str(dense.pop()).removeprefix("torch."))
    formats = {name: linear.format for name, linear in model.linears().items()}
    quantization = to_compressed_tensors({"lm_head": DENSE, **formats})  # other tools have a tied head as a layer, too
    if quantization is not None:
        hf["quantization_config"] = quantization
    generation = {name: hf[name] for name in ("bos_token_id", "eos_token_id")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS, {"format": "pt"})
    for name, content in (("config.json", hf), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).exists():
            shutil.copyfile(tokenizer_from / name, folder / name)


def weights_bytes(folder: Path) -> int:
    """Bytes of all tensors of a checkpoint, without file headers."""
    return sum(tensor.nbytes for _, tensor in _tensors(folder))


def quantised_share_of_fp32(model: Decoder) -> float | None:
    """Bytes of the quantised layers' tensors over the bytes of the same weights in FP32; None when all are dense."""
    layers = [linear for linear in model.linears().values() if linear.format != DENSE]
    if not layers:
        return None
    stored = sum(tensor.nbytes for linear in layers for tensor in linear.tensors().values())
    return stored / sum(4 * linear.in_features * linear.out_features for linear in layers)
