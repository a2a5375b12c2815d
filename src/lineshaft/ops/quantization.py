"""Which layer is stored in which format, in the words of `quantization_config` in config.json.

Two ways of saying it are read and written: compressed-tensors (integers) and DeepSeek's (FP8 by blocks). transformers
and vLLM read both. What we can't run exactly is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from lineshaft.base.errors import BadCheckpoint, ConfigError, UnsupportedModel
from lineshaft.ops.compressed_tensors import INTEGER, Table, Wanted, from_config, refuse_others, to_config
from lineshaft.ops.formats import DENSE, Dense, Format, Fp8Block

_FP8 = "FP8 (e4m3) weights with one scale a block, as DeepSeek-V3 ships them"


def to_quantization_config(formats: Mapping[str, Format]) -> dict[str, Any] | None:
    """The `quantization_config` for layers in these formats, by their names in the file, or None when all are dense.

    Name every module that holds a matrix, compressed or not, since other tools compress what they are not told to leave.
    Raises ConfigError for FP8 beside integers, or FP8 of several kinds, which no dialect can say.
    """
    kinds = {item for item in formats.values() if not isinstance(item, Dense)}
    if not kinds:
        return None
    blocks = [kind for kind in kinds if isinstance(kind, Fp8Block)]
    if not blocks:
        return to_config(formats)
    if len(kinds) > 1:
        raise ConfigError("FP8 layers can't be saved in one checkpoint with layers in another quantised format: store all alike")
    left = sorted(name for name, item in formats.items() if isinstance(item, Dense))
    scale = {"scale_fmt": "ue8m0"} if blocks[0].power_of_two else {}
    size = {"weight_block_size": list(blocks[0].block), "modules_to_not_convert": left}
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"} | size | scale


def from_quantization_config(config: Table, layers: Iterable[str], stored: Container[str]) -> dict[str, Format]:
    """The format of each of these linear layers, by their names in the file; `stored` holds the names of all tensors there.

    A layer is FP8 where its weight_scale_inv is stored: DeepSeek's configs do not list what they leave alone.
    Raises UnsupportedModel for a scheme that we do not read, BadCheckpoint when the table is broken.
    """
    try:
        if (method := config["quant_method"]) == "fp8":
            block = _fp8_of(config)
            return {name: block if f"{name}.weight_scale_inv" in stored else DENSE for name in layers}
        if method != "compressed-tensors":
            raise UnsupportedModel(f'quantization by "{method}" is not supported; supported: {INTEGER}; {_FP8}')
        return from_config(config, layers)
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise BadCheckpoint(f"quantization_config can't be read: {error!r}") from None


def _fp8_of(config: Table) -> Fp8Block:
    wanted: Wanted = (
        ("fmt", config.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn")),
        ("activation_scheme", config.get("activation_scheme", "dynamic"), ("dynamic",)),
        ("scale_fmt", config.get("scale_fmt"), (None, "float", "ue8m0")),
        ("expert_dtype", config.get("expert_dtype", "fp8"), ("fp8",)),
        ("modules_to_convert", config.get("modules_to_convert"), (None, [])),
        ("kv_cache_scheme", config.get("kv_cache_scheme"), (None, {})),
    )
    refuse_others(wanted, _FP8)
    block = config.get("weight_block_size")
    if block is None:
        raise UnsupportedModel(f"quantization_config: no weight_block_size (one scale a tensor) is not supported; supported: {_FP8}")
    sizes = isinstance(block, list) and [size for size in block if type(size) is int and size > 0]
    if not sizes or sizes != block or len(sizes) != 2:
        raise BadCheckpoint(f"quantization_config: weight_block_size {block!r} is not a number of outputs and a number of inputs")
    return Fp8Block((sizes[0], sizes[1]), power_of_two=config.get("scale_fmt") == "ue8m0")
