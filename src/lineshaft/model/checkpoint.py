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

from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf import from_hf, to_hf
from lineshaft.ops.formats import DENSE, from_compressed_tensors, to_compressed_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises BadCheckpoint when it is missing or broken."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{folder}: no {name} here; a checkpoint is a Hugging Face folder with config.json and safetensors") from None
    except (OSError, ValueError) as error:
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
    Raises BadCheckpoint naming tensors that are missing, unknown, or of the wrong shape.
    """
    model = _hollow(load_config(folder), read_json(folder, "config.json").get("quantization_config"))
    tensors = dict(_tensors(folder))
    if model.lm_head is None:
        tensors.pop("lm_head.weight", None)  # a tied head that was written out as well
    _check_fit(folder, model.state_dict(), tensors)
    model.load_state_dict({name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}, assign=True)
    for router in model.routers():
        router.load = torch.zeros(router.load.shape)  # not saved, so still without memory
    return model.eval().requires_grad_(False)


def _hollow(config: ModelConfig, quantization: dict[str, Any] | None) -> Decoder:
    """The model with tensors of the right shape and format that take no memory."""
    with torch.device("meta"):
        model = Decoder(config)
        if quantization is not None:
            fmt, ignored = from_compressed_tensors(quantization)
            for name, linear in model.linears().items():
                if name not in ignored:
                    linear.reserve(fmt)
    return model


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    names = [WEIGHTS]
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder, INDEX).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name:
            raise BadCheckpoint(f"{folder / INDEX}: names a file outside the folder: {name}")
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"{folder / name}: can't be read as safetensors: {error}") from None


def _check_fit(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    extra_layer = f"model.layers.{len([name for name in expected if name.endswith('input_layernorm.weight')])}."
    if any(name.startswith(extra_layer) for name in found):
        raise UnsupportedModel(f"{folder}: holds multi-token-prediction layers ({extra_layer}*), which are not supported yet")
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape)
    for what, names in (("missing", missing), ("not part of this model", unknown)):
        if names:
            raise BadCheckpoint(f"{folder}: {len(names)} tensors are {what}: {', '.join(names[:5])}{' ...' if names[5:] else ''}")
    if wrong:
        name = wrong[0]
        raise BadCheckpoint(f"{folder}: {name} has shape {list(found[name].shape)}, config.json means {list(expected[name].shape)}")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    keeps = name.endswith(("e_score_correction_bias", "weight_scale")) or not tensor.is_floating_point()
    return tensor if dtype is None or keeps else tensor.to(dtype)


def save_checkpoint(model: Decoder, folder: Path, tokenizer_from: Path) -> None:
    """Write the model as a Hugging Face folder, with the tokenizer files of another folder beside it."""
    dense = {parameter.dtype for parameter in model.parameters()}
    if len(dense) != 1:
        raise ConfigError(f"all dense weights of a checkpoint must have one dtype, found {sorted(map(str, dense))}")
    hf = to_hf(model.config, str(dense.pop()).removeprefix("torch."))
    quantization = to_compressed_tensors({name: linear.format for name, linear in model.linears().items()})
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
    return sum(tensor.nbytes for linear in layers for tensor in linear.tensors().values()) / sum(4 * x.in_features * x.out_features for x in layers)
