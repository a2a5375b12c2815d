"""The helpers of these tests and of the model's and the trainer's are found here."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("compress", "model", "train"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))  # pytest's importlib mode does not find helpers elsewhere
