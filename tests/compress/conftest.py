"""The helpers of the model's and the trainer's tests serve here as well, beside our own."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("model", "train", "compress"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))  # pytest's importlib mode does not find helpers elsewhere
