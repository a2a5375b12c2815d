"""What calibration can be told."""

from __future__ import annotations

from pydantic import PositiveInt

from lineshaft.base.config import Config


class CalibrationConfig(Config):
    """How much text a model is calibrated on."""

    sequences: PositiveInt = 64
    """Rows of text; where there are fewer, all of them."""
    sequence_tokens: PositiveInt = 512
    """Tokens of a row."""
    seed: int = 0
    """Chooses the rows."""
