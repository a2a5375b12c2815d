"""Starting an engine in a process of its own, for the server and for files of requests."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from lineshaft.base.terminal import say
from lineshaft.engine.config import EngineConfig
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.remote import RemoteEngine
from lineshaft.serve.served import Served
from lineshaft.serve.spawn import taken
from lineshaft.text import contract
from lineshaft.text.tokenizer import Tokenizer


async def started(folder: Path, engine: EngineConfig, stall_seconds: float, metrics: Metrics) -> Served:
    """The checkpoint in `folder`, ready to answer.

    Raises BrokenContract when the tokenizer gives other tokens than the model was trained on, and whatever loading it raises.
    """
    async with AsyncExitStack() as stack:
        remote = await RemoteEngine.spawned(folder, engine, stall_seconds, taken(str(folder)))
        stack.push_async_callback(remote.close)  # unless all goes well
        tokenizer = await asyncio.to_thread(_checked_tokenizer, folder)  # while the process begins
        ready = await remote.wait_ready()
        for line in ready.told:
            say(line)
        metrics.set("lineshaft:model_weight_bytes", ready.weight_bytes)
        metrics.set("lineshaft:bits_per_weight", ready.bits_per_weight)
        metrics.set("lineshaft:kv_cache_bytes_per_token", ready.kv_bytes_per_token)
        served = Served(remote, tokenizer)
        stack.pop_all()
        return served


def _checked_tokenizer(folder: Path) -> Tokenizer:
    contract.check_folder(folder)
    return Tokenizer.load(folder)
