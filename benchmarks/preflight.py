"""Predicted peak memory beside measured: models trained, served, rounded, distilled, calibrated, pruned, and given formats for a budget.

    python benchmarks/preflight.py [TASK ...]

Each runs in a process of its own, which predicts before it begins, then does the task with random weights, and reports the
highest resident memory that the system saw (VmHWM). That counts a page twice where a file is mapped twice, as the proof of compression
does; there it is what /proc/PID/smaps tells, each file's pages once. Calibration counts what no file holds, so there it is RssAnon, laid
on what the process had at first. Both are looked at every 5 ms, from outside. Needs Linux and 2 GiB of memory; takes some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lineshaft.base.config import load
from lineshaft.base.machine import machine, peak_memory_bytes
from lineshaft.compress.budget_preflight import judge_budget
from lineshaft.compress.calibrate.rows import Surroundings, rows_at_once
from lineshaft.compress.calibrate.walk import walk
from lineshaft.compress.calibrate_preflight import METHODS, Calibrating, judge_calibrating
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.distil import Distil, Mixture, pairs_of
from lineshaft.compress.distil_preflight import Distilling, judge_distilling
from lineshaft.compress.plan import BudgetConfig, plan
from lineshaft.compress.preflight import Compressing, judge_compressing
from lineshaft.compress.proof import Tolerance, prove, remember
from lineshaft.compress.prune_plan import PruneConfig, schedule
from lineshaft.compress.prune_preflight import judge_pruning
from lineshaft.compress.prune_stage import prune
from lineshaft.compress.stage import compress
from lineshaft.compress.steps import STEPS as COMPRESSING
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.preflight import Serving, judge_serving
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.config import ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.fit import Verdict
from lineshaft.model.folder import load_config
from lineshaft.model.memory import stored_in
from lineshaft.model.rope import rotation
from lineshaft.sched.request import Ask, Sampling
from lineshaft.train import loop
from lineshaft.train.batches import Batch
from lineshaft.train.objective import NextToken
from lineshaft.train.preflight import Training, judge_training

GQA = {"kind": "gqa", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
MLA = {"kind": "mla", "num_attention_heads": 8, "kv_lora_rank": 128, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "first_k_dense_replace": 1}
SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "max_position_embeddings": 2048, "vocab_size": 8192}
LLAMA = {"family": "llama", **SIZES, "attention": GQA}
WIDE = LLAMA | {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 16384}
QWEN3 = WIDE | {"family": "qwen3", "attention": GQA | {"qk_norm": True}, "tie_word_embeddings": True}
DEEPSEEK = SIZES | {"family": "deepseek_v3", "attention": MLA | {"q_lora_rank": 192}, "moe": MOE}
MIXTRAL = SIZES | {"family": "mixtral", "attention": GQA, "moe": MOE | {"scoring_func": "softmax", "n_shared_experts": 0}}
FEW = {"num_hidden_layers": 4}
AHEAD = DEEPSEEK | FEW | {"num_nextn_predict_layers": 1}
INT4 = {"format": "int4", "group": 64}
SHORT = {"step_share": 0.2, "calibration_rows": 4, "recovery_steps": 3, "last_recovery_steps": 3, "precision": "float32"}

CASES: list[dict[str, Any]] = [
    {"task": "train", "model": LLAMA, "rows": 8, "sequence_tokens": 256},
    {"task": "train", "model": DEEPSEEK, "rows": 4, "sequence_tokens": 256},
    {"task": "train", "model": QWEN3, "rows": 2, "sequence_tokens": 512, "accumulate": 2},
    {"task": "train", "model": LLAMA, "rows": 8, "sequence_tokens": 256, "precision": "bfloat16"},
    {"task": "serve", "model": WIDE, "engine": {"cache_bytes": 64 << 20}},
    {"task": "serve", "model": DEEPSEEK, "engine": {"cache_bytes": 64 << 20, "scheduler": {"step_tokens": 1024}}},
    {"task": "serve", "model": QWEN3, "engine": {"dtype": "bfloat16", "cache_bytes": 64 << 20}},
    {"task": "serve", "model": WIDE, "format": {"group": 32}, "engine": {"cache_bytes": 64 << 20}},
    {"task": "compress", "model": WIDE, "format": {}},
    {"task": "compress", "model": DEEPSEEK, "format": {"group": 32}},
    {"task": "compress", "model": WIDE, "dtype": "bfloat16", "format": {"group": 32}},
    {"task": "compress", "model": MIXTRAL, "format": {}},
    {"task": "distil", "model": WIDE, "student": 2, "rows": 4, "sequence_tokens": 256},
    {"task": "distil", "model": DEEPSEEK, "student": 4, "rows": 4, "sequence_tokens": 256, "mixture": {"hidden_weight": 1.0}},
    {"task": "distil", "model": WIDE, "student": 2, "rows": 4, "sequence_tokens": 256, "format": {"group": 32}},
    {"task": "distil", "model": QWEN3, "dtype": "bfloat16", "student": 2, "rows": 2, "sequence_tokens": 512, "accumulate": 2},
    {"task": "calibrate", "step": "gptq", "model": WIDE | FEW, "config": INT4, "sequences": 32, "sequence_tokens": 512},
    {
        "task": "calibrate",
        "step": "gptq",
        "model": MIXTRAL | FEW,
        "dtype": "bfloat16",
        "config": INT4,
        "sequences": 64,
        "sequence_tokens": 512,
    },
    {"task": "calibrate", "step": "gptq", "model": AHEAD, "config": INT4, "sequences": 32, "sequence_tokens": 256},
    {"task": "calibrate", "step": "awq", "model": WIDE | FEW, "dtype": "bfloat16", "config": INT4, "sequences": 64, "sequence_tokens": 512},
    {"task": "calibrate", "step": "awq", "model": MIXTRAL | FEW, "config": INT4, "sequences": 16, "sequence_tokens": 256, "length": 32},
    {"task": "calibrate", "step": "awq", "model": AHEAD, "config": INT4, "sequences": 32, "sequence_tokens": 512},
    {"task": "calibrate", "step": "smooth", "model": WIDE | FEW, "sequences": 32, "sequence_tokens": 1024},
    {"task": "calibrate", "step": "smooth", "model": AHEAD, "dtype": "bfloat16", "sequences": 64, "sequence_tokens": 512, "length": 64},
    {"task": "prune", "model": WIDE, "config": {"channels": 0.4, "rows": 4, **SHORT}},
    {"task": "prune", "model": WIDE, "config": {"channels": 0.4, "rows": 4, **SHORT, "recovery_steps": 0, "last_recovery_steps": 0}},
    {"task": "prune", "model": DEEPSEEK, "config": {"channels": 0.25, "experts": 0.25, "heads": 0.25, "rows": 4, **SHORT}},
    {"task": "budget", "model": WIDE, "config": {"bits": 6, "rows": 2}},
    {"task": "budget", "model": WIDE, "config": {"bits": 6, "rows": 2, "measure": "fisher"}},
    {"task": "budget", "model": DEEPSEEK, "config": {"bits": 6, "rows": 1, "formats": ["int8", "int4-32"], "measure": "gradient"}},
]


def main() -> None:
    print(f"# {json.dumps(machine())}")
    chosen = [case for case in CASES if len(sys.argv) == 1 or case["task"] in sys.argv[1:]]
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            if case["task"] != "train":
                child("write", case, folder)
            (own, predicted, measured), seen = child("run", case, folder)
            measured += seen
        ratio, beyond = predicted / measured, (predicted - own) / (measured - own)
        told = {name: value for name, value in case.items() if name not in ("task", "model")}
        shown = f"predicted {predicted >> 20:5} MiB  measured {measured >> 20:5} MiB  ratio {ratio:.3f}  without the process {beyond:.3f}"
        print(f"{case['task']:8} {case['model']['family']:11} {shown}  {json.dumps(told)}", flush=True)


def child(what: str, case: dict[str, Any], folder: str) -> tuple[list[int], int]:
    """Run one step in a fresh process; what it printed, and the most memory of the task's kind that it had."""
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command, pipe, peak = [sys.executable, __file__, "--child", what, folder], subprocess.PIPE, 0
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as running:
        assert running.stdin is not None and running.stdout is not None
        running.stdin.write(json.dumps(case))
        running.stdin.close()
        while running.poll() is None:
            peak = max(peak, WATCHED[case["task"]](running.pid)) if what == "run" and case["task"] in WATCHED else 0
            time.sleep(0.005)
        printed = running.stdout.read()
    if running.returncode:
        sys.exit(f"{case['task']}: the process ended with {running.returncode}")
    return list(json.loads(printed)), peak


def anonymous_memory(process: int) -> int:
    """What it holds that no file does; 0 when it has ended."""
    try:
        found = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("RssAnon")]
    except OSError:
        return 0
    return int(found[0].split()[1]) * 1024 if found else 0


def resident_once(process: int) -> int:
    """All its pages, those of a checkpoint's file that is mapped several times once; 0 when it has ended."""
    total, files, name = 0, dict[str, int](), ""
    try:
        lines = Path(f"/proc/{process}/smaps").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
            total += 0 if ".safetensors" in name else size
            files[name] = max(files.get(name, 0), size)
        elif "-" in line.split(" ", 1)[0]:
            name = (line.split(maxsplit=5) + [""] * 6)[5]
    return total + sum(size for name, size in files.items() if ".safetensors" in name)


WATCHED = {"calibrate": anonymous_memory, "compress": resident_once, "budget": resident_once}


def write(case: dict[str, Any], folder: Path) -> None:
    """A checkpoint with random weights, compressed when it is to be served so."""
    model = Decoder(ModelConfig.model_validate(case["model"]))
    model.initialise(1)
    model.to(getattr(torch, case.get("dtype", "float32")))
    if case["task"] in ("serve", "distil") and "format" in case:
        compress(model, CompressConfig(**case["format"]))
    save_checkpoint(model, folder, folder)


def run(case: dict[str, Any], folder: Path) -> list[int]:
    """[own memory before, predicted, measured] of one case."""
    before = anonymous_memory(os.getpid())
    verdict = TASKS[case["task"]](case, folder)
    seen_by_us = {"calibrate": verdict.own - before, "compress": 0, "budget": 0}
    return [verdict.own, verdict.needs, seen_by_us.get(case["task"], peak_memory_bytes())]


class RandomBatches:
    """Rows of two documents of random tokens."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.row, self.count = case["sequence_tokens"], case["rows"] * case["sequence_tokens"]
        self.vocabulary = case["model"]["vocab_size"]

    def __getitem__(self, number: int) -> Batch:
        tokens = torch.randint(0, self.vocabulary, (self.count,), generator=torch.Generator().manual_seed(number))
        half = self.row // 2
        return Batch(tokens, torch.arange(self.count) % half, tokens, torch.arange(0, self.count, half), row=self.row)


def train(case: dict[str, Any], folder: Path) -> Verdict:
    config, precision, accumulate = ModelConfig.model_validate(case["model"]), case.get("precision", "float32"), case.get("accumulate", 1)
    verdict = judge_training(Training(config, case["rows"], case["sequence_tokens"], accumulate, precision))
    model = Decoder(config)
    model.initialise(1)
    settings = loop.LoopConfig(steps=4, log_every=1, save_every=2, precision=precision, accumulate=accumulate)
    loop.run(model, RandomBatches(case), NextToken(), settings, folder / "scratch")
    save_checkpoint(model, folder / "made", folder)
    return verdict


def serve(case: dict[str, Any], folder: Path) -> Verdict:
    config = EngineConfig.model_validate(case["engine"])
    verdict = judge_serving(Serving(load_config(folder), stored_in(folder), config))
    engine = Engine.load(folder, config)
    length = min(engine.context_tokens - 256, 1000)
    for number in range(config.scheduler.max_batch):
        prompt = torch.randint(0, case["model"]["vocab_size"], (length,), generator=torch.Generator().manual_seed(number))
        engine.submit(Ask(prompt.tolist(), Sampling(max_tokens=256, ignore_eos=True)))
    fullest = 0.0
    for _ in range(STEPS):
        engine.step()
        fullest = max(fullest, engine.load_now().cache_usage)
    assert fullest > 0.9, fullest
    return verdict


STEPS = 50
"""Enough to fill the cache of every case here."""


def compress_case(case: dict[str, Any], folder: Path) -> Verdict:
    config = CompressConfig(**case["format"])
    verdict = judge_compressing(Compressing(load_config(folder), stored_in(folder), config.formats))
    model = load_checkpoint(folder)
    before = remember(model, folder)
    compress(model, config)
    save_checkpoint(model, folder / "made", folder)
    prove(before, model, folder / "made", Tolerance(config.tolerated_nats))
    return verdict


def distil(case: dict[str, Any], folder: Path) -> Verdict:
    described = load_config(folder)
    config, mixture = described.model_copy(update={"num_hidden_layers": case["student"]}), Mixture(**case.get("mixture", {}))
    training = Training(config, case["rows"], case["sequence_tokens"], case.get("accumulate", 1), "float32")
    pairs = len(pairs_of(case["student"], described.num_hidden_layers)) if mixture.hidden_weight else 0
    verdict = judge_distilling(Distilling(training, described, stored_in(folder), True, pairs))
    teacher, student = load_checkpoint(folder), Decoder(config)
    student.initialise(1)
    objective = Distil(teacher, student, mixture)
    settings = loop.LoopConfig(steps=4, log_every=1, save_every=2, precision="float32", accumulate=training.accumulate)
    with objective.learning(student):
        loop.run(student, RandomBatches(case), objective, settings, folder / "scratch")
    save_checkpoint(student, folder / "made", folder)
    return verdict


def calibrate(case: dict[str, Any], folder: Path) -> Verdict:
    told = case.get("config", {}) | {name: case[name] for name in ("sequences", "sequence_tokens")}
    config, described = load(COMPRESSING[case["step"]].config, told), load_config(folder)
    verdict = judge_calibrating(Calibrating.of(described, stored_in(folder), config))
    model = load_checkpoint(folder)
    before = remember(model, folder)
    scales, _ = walk(model, random_rows(case, described), METHODS[case["step"]](config), folder / "scratch")
    save_checkpoint(model, folder / "made", folder)
    prove(before, model, folder / "made", Tolerance(100.0, nearest=False, scales=scales))
    return verdict


def random_rows(case: dict[str, Any], described: ModelConfig) -> list[Surroundings]:
    """Batches as calibration has them, of documents of `length` tokens, half a row where the case says none."""
    row, found = case["sequence_tokens"], list[Surroundings]()
    for first in range(0, case["sequences"], rows_at_once(row)):
        count, length = min(rows_at_once(row), case["sequences"] - first) * row, case.get("length", row // 2)
        tokens = torch.randint(0, described.vocab_size, (count,), generator=torch.Generator().manual_seed(first))
        batch = Batch(tokens, torch.arange(count) % length, tokens, torch.arange(0, count, length), row=row)
        found.append(Surroundings(batch, rotation(described, batch.positions_T), PackedCausal(batch.starts_D, count, row)))
    return found


def budget(case: dict[str, Any], folder: Path) -> Verdict:
    config = load(BudgetConfig, case["config"])
    verdict = judge_budget(load_config(folder), stored_in(folder), config)
    model = load_checkpoint(folder)
    before, rows = remember(model, folder), RandomBatches(case | {"rows": 1, "sequence_tokens": config.row_tokens})
    found = plan(model, [rows[number] for number in range(config.rows)], config)
    compress(model, CompressConfig(policy=found.policy))
    save_checkpoint(model, folder / "made", folder)
    prove(before, model, folder / "made", Tolerance(100.0))
    return verdict


@dataclass(frozen=True)
class RandomText:
    """As pruning asks for text."""

    model: dict[str, Any]
    config: PruneConfig

    def calibration(self, step: int) -> list[Batch]:
        rows, count = self._batches(1), self.config.calibration_rows
        return [rows[step * count + number] for number in range(count)]

    def recovery(self, first: int) -> RandomBatches:
        return self._batches(self.config.rows)

    def _batches(self, rows: int) -> RandomBatches:
        return RandomBatches({"model": self.model, "rows": rows, "sequence_tokens": self.config.sequence_tokens})


def prune_case(case: dict[str, Any], folder: Path) -> Verdict:
    config = load(PruneConfig, case["config"])
    verdict = judge_pruning(load_config(folder), config)
    model = load_checkpoint(folder)
    pruned = prune(model, schedule(model, config), RandomText(case["model"], config), config, folder / "scratch")
    save_checkpoint(pruned.model, folder / "made", folder)
    return verdict


TASKS = {
    "train": train,
    "serve": serve,
    "compress": compress_case,
    "distil": distil,
    "calibrate": calibrate,
    "prune": prune_case,
    "budget": budget,
}

if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        main()
    elif sys.argv[2] == "write":
        write(json.load(sys.stdin), Path(sys.argv[3]))
        print("[]")
    else:
        print(json.dumps(run(json.load(sys.stdin), Path(sys.argv[3]))))
