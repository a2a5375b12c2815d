"""The helpers of the model's tests serve here as well."""

from __future__ import annotations

import sys
from pathlib import Path

# pytest's importlib mode finds no helpers by itself, not even beside the tests
sys.path[:0] = [str(Path(__file__).parents[1] / "model"), str(Path(__file__).parent)]
