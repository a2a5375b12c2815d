"""What the compression stage can be told."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from lineshaft.base.config import Config
from lineshaft.compress.calibrate.config import CalibrationConfig
from lineshaft.model.memory import integer_of, is_format
from lineshaft.ops.formats import DENSE, Activations, Format, Integer


def _must_say_step(schema: dict[str, Any]) -> None:
    schema["required"] = [*schema.get("required", []), "step"]


NAMED = ConfigDict(json_schema_extra=_must_say_step)
"""Of all steps but `round`: in the recipe's JSON Schema a table without `step` means that one alone."""


def _offer_bits(schema: dict[str, Any]) -> None:
    schema["properties"]["bits"] = {"description": "Short for format.", "enum": [4, 8]}


def _must_say_step_or_bits(schema: dict[str, Any]) -> None:
    _must_say_step(schema)
    _offer_bits(schema)


STATIC = "-static"
"""The end of a format's name: activations in 8 bits by one scale that calibration found."""


class Rounding(Config):
    """Weights in fewer bits, all alike or by a policy."""

    model_config = ConfigDict(json_schema_extra=_offer_bits)
    format: Literal["int8", "int4"] = "int8"
    """How weights are stored."""
    group: PositiveInt | None = None
    """Inputs that share a scale; null: one scale a channel. 32 gives 8.5 or 4.5 bits a weight, 128 gives 8.125 or 4.125."""
    symmetric: bool = True
    """Zero lies in the middle of the codes; false (int4 only): each group has a code of zero of its own, 4 bits more."""
    activations: Literal["int8"] | None = None
    """int8: products round what meets these weights as well, a scale a token: faster prompts, another rounding."""
    skip: list[str] = ["lm_head"]
    """Layers left as they are: names or patterns such as `model.layers.0.*`."""
    policy: dict[str, str] = {}
    """Other formats for some layers: name or pattern to `dense`, `int8`, `int4`, with `-N` for groups of N inputs, then `-zeros`, `-a8`
    for zero points and 8-bit activations, such as `int4-128`. Of several that mean a layer the last one counts, also over skip."""
    proof_nats: PositiveFloat | None = None
    """Nats a token by which next-token chances on a golden text may differ from the source's; more, and nothing is kept. Null: 0.05
    for int8, 0.5 where int4 takes part."""

    @model_validator(mode="before")
    @classmethod
    def _bits_are_a_format(cls, given: Any) -> Any:
        """`bits: 4` is short for `format: int4`."""
        if not isinstance(given, dict) or "bits" not in given:
            return given
        if given["bits"] not in (4, 8) or "format" in given:
            raise ValueError(f"bits: 4 or 8, and no format beside it (got {given['bits']!r})")
        return {name: value for name, value in given.items() if name != "bits"} | {"format": f"int{given['bits']}"}

    @model_validator(mode="after")
    def _supported(self) -> Rounding:
        if self.format == "int8" and not self.symmetric:
            raise ValueError("symmetric: int8 has no zero points here: leave it true, or take format int4")
        for pattern, name in self.policy.items():
            if name.endswith(STATIC) and self.ending != STATIC:
                raise ValueError(f'policy: "{pattern}": "{name}" takes calibration: only the step `static` makes it')
            if name == "fp8" or not is_format(in_memory(name)):
                told = "formats are dense, int8, int4, int8-32, int4-128, int4-32-zeros, int8-a8 and the like"
                raise ValueError(f'policy: "{pattern}": "{name}" is none: {told}')
        return self

    def coding_of(self, layer: str) -> Format:
        """How this layer is to be stored; dense where it is left as it is."""
        if meant := [name for pattern, name in self.policy.items() if fnmatchcase(layer, pattern)]:
            return coding(meant[-1])
        return DENSE if any(fnmatchcase(layer, pattern) for pattern in self.skip) else coding(self.whole)

    @property
    def whole(self) -> str:
        """The format of layers that no policy names."""
        group, zeros = "" if self.group is None else f"-{self.group}", "" if self.symmetric else "-zeros"
        return f"{self.format}{group}{zeros}{self.ending}"

    @property
    def ending(self) -> str:
        """Of that name: what is done to activations."""
        return "" if self.activations is None else "-a8"

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that layers may come to have, but for dense, as model.memory knows them."""
        return tuple(dict.fromkeys(in_memory(name) for name in (self.whole, *self.policy.values()) if name != "dense"))

    @property
    def tolerated_nats(self) -> float:
        """`proof_nats`, or what it means."""
        return self.proof_nats or (0.5 if any(name.startswith("int4") for name in self.formats) else 0.05)


class CompressConfig(Rounding):
    """Rounding each weight to the nearest."""

    step: Literal["round"] = "round"


class _Calibrated(Rounding, CalibrationConfig):
    model_config = ConfigDict(json_schema_extra=_must_say_step_or_bits)
    format: Literal["int8", "int4"] = "int4"
    """How weights are stored."""
    group: PositiveInt | None = 128
    """Inputs that share a scale; null: one scale a channel. 32 gives 8.5 or 4.5 bits a weight, 128 gives 8.125 or 4.125."""


class GptqConfig(_Calibrated):
    """Rounding that makes up for its own errors, by calibration (compress/gptq.py)."""

    step: Literal["gptq"] = "gptq"
    damp: float = Field(0.01, gt=0, le=1)
    """What is added to the diagonal of the Hessian, as a share of its mean."""
    order: Literal["none", "activation"] = "activation"
    """Inputs are rounded as they stand, or those of the largest mean square first."""


class AwqConfig(_Calibrated):
    """Scales along junctions, and clips, that leave outputs alike on calibration text; then rounding to nearest (compress/awq.py)."""

    step: Literal["awq"] = "awq"
    points: int = Field(20, ge=1, le=1000)
    """Scales that are tried of each of two kinds, a junction."""
    clip: bool = True
    """Search for where to clip each group of 4-bit weights as well, where as many tokens came to a layer as a group has inputs."""


class StaticConfig(Rounding, CalibrationConfig):
    """Rounding to nearest, with activations in 8 bits by one scale a layer that calibration finds (compress/ranges.py)."""

    model_config = ConfigDict(json_schema_extra=_must_say_step_or_bits)
    step: Literal["static"] = "static"
    activations: Literal["int8"] = "int8"
    """8 bits, by one scale for all tokens of a layer. Routed experts keep a scale a token."""
    range: Literal["minmax", "percentile", "mse", "entropy", "cut"] = "mse"
    """Where activations are clipped: at the largest seen; below it by 0.01 % of the numbers; where squared error is least; where what is
    lost of their distribution is least (KL divergence); where clipping takes at most 0.1 % of the summed magnitude."""

    @property
    def ending(self) -> str:
        """See Rounding."""
        return STATIC


class SmoothConfig(CalibrationConfig):
    """Outliers of activations moved into weights, by calibration (compress/smooth.py); weights stay dense, for a step after this."""

    model_config = NAMED
    step: Literal["smooth"] = "smooth"
    alpha: float = Field(0.5, ge=0, le=1)
    """How much of the difficulty goes into the weights."""
    norms_only: bool = True
    """Only where a norm writes; else the rows of v, up and kv_b are divided as well."""
    proof_nats: PositiveFloat = 0.02
    """Nats a token by which next-token chances on a golden text may differ from the source's; more, and nothing is kept."""


def coding(name: str) -> Format:
    """The format of this name (model.memory.is_format, or one of those with STATIC in the place of -a8), in the layout where other engines
    expect it: 8-bit codes that meet 8-bit activations lie one a byte."""
    if name == "dense":
        return DENSE
    bits, group, zeros, rounded = integer_of(in_memory(name))
    activations: Activations | None = "int8-static" if name.endswith(STATIC) else "int8" if rounded else None
    return Integer(bits, group, not zeros, activations, "int-quantized" if bits == 8 and rounded else "pack-quantized")


def in_memory(name: str) -> str:
    """The name by which model.memory knows a format: it takes as much whichever way activations are rounded."""
    return f"{name.removesuffix(STATIC)}-a8" if name.endswith(STATIC) else name
