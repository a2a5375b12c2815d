"""Rotary positions beyond the trained context, as data: what `rope_scaling` of a config.json can say. Free of torch.

The formulas are in model/rope.py. Field names are those of config.json.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lineshaft.base.config import Config


class Linear(Config):
    """Positions squeezed by a factor (Chen et al. 2023, arXiv 2306.15595)."""

    rope_type: Literal["linear"] = "linear"
    factor: PositiveFloat


class Dynamic(Config):
    """A base that grows with texts longer than max_position_embeddings ("NTK-aware", dynamic); shorter ones turn as trained."""

    rope_type: Literal["dynamic"] = "dynamic"
    factor: PositiveFloat


class Llama3(Config):
    """Slow turns squeezed, fast ones kept, a ramp between them (Llama 3.1)."""

    rope_type: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt

    @model_validator(mode="after")
    def _consistent(self) -> Llama3:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor {self.high_freq_factor} must be more than low_freq_factor {self.low_freq_factor}")
        return self


class Yarn(Config):
    """Turns squeezed by how often they went round within the trained context (YaRN, arXiv 2309.00071, section 3.2)."""

    rope_type: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    """Channels that turn more often than this within the trained context are kept."""
    beta_slow: PositiveFloat = 1.0
    """Those that turn less often are squeezed by the whole factor."""
    truncate: bool = True
    """Round the two bounds to whole channels."""
    mscale: float = Field(0.0, ge=0)
    mscale_all_dim: float = Field(0.0, ge=0)
    """DeepSeek: how the temperature is split between rotated and all channels; 0: not said."""
    attention_factor: PositiveFloat | None = None
    """Length of the turned vectors; null: by the rule of the paper, or of mscale and mscale_all_dim when both are set."""

    @property
    def length(self) -> float:
        """What sine and cosine are multiplied by (section 3.4)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def score_scale(self) -> float:
        """What latent attention multiplies its scores by besides 1/sqrt(d): DeepSeek's code, `mscale` squared."""
        return self._temperature(self.mscale_all_dim) ** 2

    def _temperature(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


RopeScaling = Linear | Dynamic | Llama3 | Yarn
