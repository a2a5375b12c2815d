"""Checkpoints of tiny models, and engines of their first and second starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.starts import reopen
from lineshaft.engine.starts.keep import Asked, keep
from lineshaft.engine.warm import fingerprint
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.decoder import Decoder

SETTINGS: dict[str, Any] = {"page_tokens": 4, "cache_bytes": 1 << 18, "scheduler": {"step_tokens": 24, "max_batch": 6}}
FACTS = {"told": ["all is well"]}
CASES = [
    ("llama", torch.float32, "auto", None),
    ("llama", torch.bfloat16, "auto", None),
    ("mistral", torch.bfloat16, "int8", None),
    ("qwen3", torch.float32, "auto", None),
    ("qwen3_moe", torch.bfloat16, "auto", None),
    ("deepseek_v3", torch.float32, "auto", None),
    ("deepseek_v32", torch.bfloat16, "auto", None),
    ("deepseek_v3", torch.bfloat16, "int8", None),
    ("llama", torch.float32, "auto", 8),
    ("qwen3", torch.bfloat16, "auto", 4),
]
"""Family, dtype, cache, and bits of the weights."""


def stored(model: Decoder, folder: Path) -> Path:
    save_checkpoint(model, folder, folder)
    return folder


def settings(**more: object) -> EngineConfig:
    return EngineConfig.model_validate(SETTINGS | more)


def started(folder: Path, config: EngineConfig) -> Engine:
    """The engine of a first start, when what it leaves is on the disk."""
    asked = Asked.now(folder, config)
    engine = Engine.load(folder, config)
    thread = keep(engine, asked, fingerprint(engine), FACTS)
    assert thread is not None
    thread.join()
    return engine


def opened(folder: Path, config: EngineConfig) -> reopen.Reopened | None:
    root = reopen.kept_for(folder, config)
    return reopen.reopened(folder, root) if root else None
