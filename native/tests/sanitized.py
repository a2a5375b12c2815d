"""A pytest plugin: the library that LINESHAFT_SANITIZED names takes the place of the installed one, however the package is installed."""

from __future__ import annotations

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("lineshaft._native", os.environ["LINESHAFT_SANITIZED"])
assert spec is not None
assert spec.loader is not None
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
