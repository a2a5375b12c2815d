"""The calibrated steps are refused before weights load where they can't fit; what they hold is what is counted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_line import INT8, ROWS, line
from shapes import SHAPES
from torch.profiler import ProfilerActivity, profile

from lineshaft.base.config import load
from lineshaft.base.errors import DoesNotFit
from lineshaft.base.store import Artifact
from lineshaft.compress import calibrated
from lineshaft.compress.calibrate.parts import Part, parts_of
from lineshaft.compress.calibrate.rows import Surroundings
from lineshaft.compress.calibrate_preflight import HOLES, MAPPED, METHODS, Calibrating, calibrate_memory, judge_calibrating
from lineshaft.compress.steps import STEPS
from lineshaft.model import fit
from lineshaft.model.attend import PackedCausal
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import products
from lineshaft.model.decoder import Decoder
from lineshaft.model.memory import Stored
from lineshaft.model.rope import rotation
from lineshaft.train.batches import Batch
