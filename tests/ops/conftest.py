"""The helpers of the model's tests serve here as well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))  # pytest's importlib mode does not find helpers elsewhere
