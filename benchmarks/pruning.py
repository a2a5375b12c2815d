"""What structured pruning costs and saves: held-out loss beside an equal-step control, decode speed beside its bound.

    .venv/bin/python benchmarks/pruning.py loss --store FOLDER [--models llama ...] [--seed 2] [--cut channels=0.4 ...] [--set KEY=VALUE]
    .venv/bin/python benchmarks/pruning.py redundant --store FOLDER         # a quarter of the experts are copies, and a quarter is cut
    .venv/bin/python benchmarks/pruning.py speed [FOLDER] [--cut channels=0.4,heads=0.5]

loss: tiny models trained on the quickstart's text (fidelity_models.py). The control is the dense model trained further, for as many steps,
on the same batches, at the same learning rate; where layers were rebuilt also for as many steps more. Rises are in percent of the
control's loss, with the 95 % interval of the paired differences over held-out rows. The store keeps all models.
speed: one stream of greedy decoding by the engine, bf16; FOLDER or a random llama of 0.53 G weights (half.py), dense and pruned in turns.
The bound is 1 / (1 - share of the weights cut that a token uses).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fidelity_models import STEPS, trained
from half import folder_of

from lineshaft.base.config import load, parse_assignment
from lineshaft.base.machine import machine
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.compress.prune_plan import PruneConfig, schedule
from lineshaft.compress.prune_stage import PRUNE
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.model.shrink import Cut, each, without
from lineshaft.records.tokens import TokenStream
from lineshaft.sched.request import Ask, Emitted, Sampling
from lineshaft.train.batches import IGNORE, RowReader
from lineshaft.train.finetune import FINETUNE, FinetuneConfig

HELD_OUT_ROWS = 402
CHANGES = {"llama": {"num_hidden_layers": 4, "intermediate_size": 640}, "qwen3_moe": {}}
"""Of the shapes in fidelity_models.py: a llama of 1.3 M weights whose feed-forward blocks hold three quarters of them."""
SETTINGS = {"rows": 4, "precision": "float32"}
"""Batches as those of the quickstart, in float32 on every machine."""


# -- loss -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def losses(checkpoint: Artifact, tokens: Artifact) -> np.ndarray:
    """Nats a token of each held-out row of 256 tokens."""
    model, reader = load_checkpoint(checkpoint.root), RowReader(TokenStream(tokens, "heldout"), 256)
    found = []
    for row in range(min(reader.rows, HELD_OUT_ROWS)):
        batch = reader.batch(np.array([row]))
        logits_TV = model(batch.tokens_T, batch.positions_T, PackedCausal(batch.starts_D, 256, 256))
        found.append(F.cross_entropy(logits_TV, batch.targets_T, ignore_index=IGNORE).item())
    return np.array(found)


def rise(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Of the mean loss in percent, with half the 95 % interval of a ratio of means."""
    ratio = ours.mean() / theirs.mean()
    spread = (ours - theirs * ratio).std(ddof=1) / len(ours) ** 0.5 / theirs.mean()
    return f"{100 * (ratio - 1):+.2f} % ± {196 * spread:.2f}"


def control(store: Store, checkpoint: Artifact, tokens: Artifact, config: PruneConfig, steps: int) -> Artifact:
    """The dense model, trained further as the pruned one was."""
    loop = config.training(steps).loop
    same = {name: getattr(config, name) for name in ("seed", "sequence_tokens", "rows", "further_weight")}
    return FINETUNE(store, FinetuneConfig(**same, loop=loop), checkpoint=checkpoint, tokens=tokens)


def recovery_steps(checkpoint: Artifact, config: PruneConfig) -> int:
    """Of all recoveries together."""
    return sum(config.recoveries(len(schedule(load_checkpoint(checkpoint.root), config))))


def compare(store: Store, checkpoint: Artifact, tokens: Artifact, config: PruneConfig) -> None:
    """One line of the table."""
    started = time.monotonic()
    pruned = PRUNE(store, config, checkpoint=checkpoint, tokens=tokens)
    seconds = time.monotonic() - started
    steps = recovery_steps(checkpoint, config)
    before, ours = losses(checkpoint, tokens), losses(pruned, tokens)
    facts = pruned.manifest.facts
    was, now = facts["parameters_before"], facts["parameters"]
    print(f"  cut {facts['cut']}, weights {was} to {now}, {steps} recovery steps, {seconds:.0f} s", flush=True)
    beside = {"source": before}
    for count in sorted({steps, steps + config.rebuilding_steps} - {0}):
        beside[f"control of {count} steps"] = losses(control(store, checkpoint, tokens, config, count), tokens)
    for name, loss in beside.items():
        print(f"    loss {ours.mean():.4f}, {name} {loss.mean():.4f}: rise {rise(ours, loss)}", flush=True)


def tables(given: argparse.Namespace) -> None:
    store = Store(given.store)
    for family in given.models:
        model = trained(store, family, given.steps, given.seed, **CHANGES[family])
        print(f"{family}, {model.checkpoint.manifest.facts['parameters']} weights", flush=True)
        for shares in given.cut or ["channels=0.2", "channels=0.4"]:
            compare(store, model.checkpoint, model.tokens, settings(shares, given.set))


def settings(shares: str, further: list[str]) -> PruneConfig:
    """The stage's config: shares such as channels=0.4,heads=0.5, and any other field."""
    return load(PruneConfig, SETTINGS | dict(parse_assignment(text) for text in [*shares.split(","), *further]))


# -- redundant experts ------------------------------------------------------------------------------------------------


def redundant(given: argparse.Namespace) -> None:
    """Of a qwen3_moe every fourth expert becomes a copy of the one before it; training further lets the two drift apart."""
    store = Store(given.store)
    model = trained(store, "qwen3_moe", given.steps)
    copies = with_copies(store, model.checkpoint)
    drifted = control(store, copies, model.tokens, settings("experts=0.25", given.set), given.drift)
    for name, checkpoint in (("exact copies", copies), (f"copies trained {given.drift} steps further", drifted)):
        for further in (["last_recovery_steps=0"], []):
            print(f"qwen3_moe, {name}", flush=True)
            compare(store, checkpoint, model.tokens, settings("experts=0.25", [*given.set, *further]))


def with_copies(store: Store, checkpoint: Artifact) -> Artifact:
    with store.draft("checkpoint", stage="copies", version=1, config={}, parents={"checkpoint": checkpoint}) as draft:
        if isinstance(draft, Artifact):
            return draft
        assert isinstance(draft, Draft)
        model = load_checkpoint(checkpoint.root)
        state = model.state_dict()
        for units in model.units():
            if units.kind == "experts":
                for first in range(2, units.count, 4):
                    state[units.own[0].tensor][first + 1] = state[units.own[0].tensor][first]
                    for name in [name for name in state if name.startswith(f"{units.members}.{first}.")]:
                        state[name.replace(f"{units.members}.{first}.", f"{units.members}.{first + 1}.")].copy_(state[name])
        save_checkpoint(model, draft.root, checkpoint.root)
        draft.facts |= {name: item for name, item in checkpoint.manifest.facts.items() if name in ("parameters", "contract")}
        made = draft.root.parent.name
    return store.open(made)


# -- speed ------------------------------------------------------------------------------------------------------------


def smaller(model: Decoder, config: PruneConfig) -> Decoder:
    """Cut to the config's sizes, whatever units: speed does not depend on which."""
    sizes, cuts = schedule(model, config)[-1], []
    for units in model.units():
        gone = units.count - each(model.config, units) * sizes[units.size] if units.size in sizes else 0
        every = [unit for place in range(gone // units.groups) for unit in range(place, units.count, units.count // units.groups)]
        cuts.append(Cut(units, dict.fromkeys(every)))
    return without(model, [cut for cut in cuts if cut.gone])


def decoded(engine: Engine, tokens: int) -> float:
    """Tokens a second after the first, of one stream."""
    engine.submit(Ask(list(range(100, 164)), Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)))
    times = [time.perf_counter() for events in steps(engine) for event in events if isinstance(event, Emitted)]
    return (len(times) - 1) / (times[-1] - times[0])


def steps(engine: Engine) -> Iterator[Any]:
    while not engine.idle:
        yield engine.step()


def speed(given: argparse.Namespace) -> None:
    with folder_of(given.folder) as folder:
        dense = load_checkpoint(folder, dtype=torch.bfloat16)
        for shares in given.cut or ["channels=0.4", "channels=0.4,heads=0.5", "layers=0.4"]:
            pruned = smaller(dense, settings(shares, []))
            before, after = cost_of(dense.config), cost_of(pruned.config)
            share = 1 - after.active_parameters / before.active_parameters
            engines = []
            for model in (load_checkpoint(folder, dtype=torch.bfloat16), pruned):
                engines.append(Engine(model, EngineConfig()))
            seen = [[decoded(engine, given.tokens) for engine in engines] for _ in range(given.rounds + 1)][1:]  # the first is a warm-up
            ratios = [ours / theirs for theirs, ours in seen]
            was, now = (statistics.median(pair[place] for pair in seen) for place in (0, 1))
            print(
                f"  {shares}: {100 * share:.1f} % of {before.active_parameters} weights a token cut, {was:.2f} to {now:.2f} tokens/s,"
                f" ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), bound {1 / (1 - share):.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    for name, run in (("loss", tables), ("redundant", redundant), ("speed", speed)):
        kind = kinds.add_parser(name)
        kind.set_defaults(run=run)
        kind.add_argument("--cut", action="append", default=[], metavar="KIND=SHARE,...")
        kind.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other field of the stage's config")
        if name == "speed":
            kind.add_argument("folder", nargs="?", default="half")
            kind.add_argument("--tokens", type=int, default=48)
            kind.add_argument("--rounds", type=int, default=5)
            continue
        kind.add_argument("--store", type=Path, required=True)
        kind.add_argument("--steps", type=int, default=STEPS, help="of the models' own training")
        if name == "loss":
            kind.add_argument("--seed", type=int, help="of the models' own training")
            kind.add_argument("--models", nargs="+", choices=CHANGES, default=list(CHANGES))
        else:
            kind.add_argument("--drift", type=int, default=100)
    given = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    given.run(given)


if __name__ == "__main__":
    main()
