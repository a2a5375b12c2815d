"""AWQ of one checkpoint by one library, in a process of its own; see calibration_peer.py.

    PYTHON calibration_contestants.py NAME OPTIONS     # NAME: lineshaft or llmcompressor; OPTIONS: JSON, see calibration_peer.py

Runs under the interpreter in which that library is installed, so it imports the standard library and that library, nothing else.
Lines of JSON: {"ready": versions} once everything is imported, and {"seconds"}: from the checkpoint on disk to the compressed one.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata

sys.path.pop(0)  # this folder: transformers would take kernels.py beside us for the package of that name


def _say(**told):
    print(json.dumps(told), flush=True)


def _versions(*packages):
    return {name: metadata.version(name) for name in packages}


def lineshaft(options):
    """The stage as `lineshaft compress --step awq` runs it: checked, walked, written and proved."""
    from pathlib import Path

    import torch

    from lineshaft.base.config import load
    from lineshaft.base.store import Store
    from lineshaft.compress.steps import STEPS

    torch.set_num_threads(options["threads"])
    store, stage = Store(Path(options["store"])), STEPS["awq"]
    config = load(stage.config, options["config"])
    request = stage.request(config, checkpoint=store.open(options["checkpoint"]), tokens=store.open(options["tokens"]))
    _say(ready=_versions("lineshaft", "torch"))
    began = time.perf_counter()
    request.carry_out(store)
    _say(seconds=time.perf_counter() - began)


def llmcompressor(options):
    """As its examples do it. Of its own accord it wants a GPU in one place: `pin_memory` gives page-locked memory for copies to one."""
    import torch

    torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.set_num_threads(options["threads"])
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM

    with open(options["rows"]) as file:
        rows = json.load(file)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    recipe = [AWQModifier(), QuantizationModifier(targets=["Linear"], scheme="W4A16", ignore=["lm_head"])]
    _say(ready=_versions("llmcompressor", "compressed-tensors", "transformers", "torch"))
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=getattr(torch, options["dtype"]))
    settings = {"max_seq_length": len(rows[0]), "num_calibration_samples": len(rows), "shuffle_calibration_samples": False}
    oneshot(model=model, tokenizer=options["folder"], dataset=data, recipe=recipe, output_dir=options["out"], **settings)
    _say(seconds=time.perf_counter() - began)


CONTESTANTS = {"lineshaft": lineshaft, "llmcompressor": llmcompressor}

if __name__ == "__main__":
    CONTESTANTS[sys.argv[1]](json.loads(sys.argv[2]))
