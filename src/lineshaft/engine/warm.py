"""The first steps of an engine, before anybody waits for them; and the proof that its answers do not depend on their company.

Whether a library adds up in the same order for every row is a property of the machine and the library, so it is tried
here: a short text alone, and in a batch that is read in chunks. The same bits must come out.
"""

from __future__ import annotations

import hashlib
from itertools import count

from lineshaft.engine.program import Floats
from lineshaft.engine.rounds import Rounds
from lineshaft.sched.admission import SchedulerConfig
from lineshaft.sched.pages import PagePool
from lineshaft.sched.request import Request, Sampling
from lineshaft.sched.scheduler import Scheduler

TEXT, COMPANY, STEP = 9, (23, 2), 20
"""Tokens of the text, of the others beside it, and of a step: the longer one is read in two chunks."""
STEPS = 2
"""Tokens that each of them gets: the second by decoding."""


def warm_up(engine: Rounds) -> bool | None:
    """Run a few tokens through the model, leaving nothing behind. Are the bits the same alone and in company?

    None where the engine does not promise that, or its cache is too small to try.
    """
    return tried(engine)[0]


def tried(engine: Rounds) -> tuple[bool | None, str]:
    """The same, and the fingerprint."""
    if engine.context_tokens < max(TEXT, *COMPANY) + STEPS:
        return None, fingerprint(engine)
    (alone,) = _answers(engine, [TEXT])
    if not engine.config.batch_invariant:
        return None, _digest(alone)
    company = _answers(engine, [*COMPANY, TEXT])
    return all(bool((one == other).all()) for one, other in zip(alone, company[-1], strict=True)), _digest(alone)


def fingerprint(engine: Rounds) -> str:
    """Of the bits of the logits that a short text alone leads to; of nothing where the cache is too small for it."""
    return _digest(_answers(engine, [TEXT])[0] if engine.context_tokens >= TEXT + STEPS else [])


def _digest(logits: list[Floats]) -> str:
    return hashlib.blake2b(b"".join(logits_V.tobytes() for logits_V in logits)).hexdigest()


def _answers(engine: Rounds, lengths: list[int]) -> list[list[Floats]]:
    """For each text the logits that chose each of its next tokens. A scheduler of its own: the engine's never hears of it."""
    pools, limits = [PagePool(pages) for pages in engine.cache.pages], engine.config.scheduler
    most, step_tokens = min(len(lengths), limits.max_batch), min(STEP, limits.step_tokens)
    config = SchedulerConfig(step_tokens=step_tokens, start_batch=most, max_batch=most, prefix_cache=False)
    scheduler = Scheduler(config, engine.cache.groups, pools, engine.config.page_tokens)
    requests = [_request(number, length, engine.bounds.vocabulary) for number, length in zip(count(1), lengths, strict=False)]
    for request in requests:
        scheduler.submit([request])
    said: list[list[Floats]] = [[] for _ in requests]
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan()
        logits_RV = engine.runs.run(plan).copy()
        for request, logits_V in zip(plan.sampling, logits_RV, strict=True):
            said[request.number - 1].append(logits_V)
        scheduler.commit(plan, logits_RV.argmax(-1).tolist())
    return said


def _request(number: int, length: int, vocabulary: int) -> Request:
    tokens = [(7 * place + 3 * length) % vocabulary for place in range(length)]
    return Request(number, length, Sampling(max_tokens=STEPS, temperature=0), frozenset(), tokens)


def told(same: bool | None) -> str:
    """The finding in a line for whoever starts the server."""
    if same is None:
        return "answers may depend in their last bits on the other requests of their batch (engine.batch_invariant=false)"
    if same:
        return "answers are the same bits alone and in any batch"
    return (
        "warning: on this machine answers may depend in their last bits on the other requests of their batch: "
        "its math library adds up in another order for other shapes (docs/serving.md)"
    )
