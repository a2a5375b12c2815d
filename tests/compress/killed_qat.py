"""A program that trains with rounded weights and kills itself (SIGKILL) in the middle of a step.

python killed_qat.py FOLDER STEP CONFIG CHECKPOINT TOKENS
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from lineshaft.base.store import Store
from lineshaft.compress.qat_stage import QAT, QatConfig
from lineshaft.train.objective import NextToken

folder, step, config, checkpoint, tokens = sys.argv[1:]
left = iter(range(1, int(step)))
plain = NextToken.__call__


def deadly(*args: Any) -> Any:
    if torch.is_grad_enabled() and next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args)


NextToken.__call__ = deadly
store = Store(folder)
QAT(store, QatConfig.model_validate_json(config), checkpoint=store.open(checkpoint), tokens=store.open(tokens))
