"""What a model lost against another one, from the reports of both: each difference with the interval that documents or prompts leave open.

Shape letters: D documents, of number, nats, tokens and correct ones (4).
"""

from __future__ import annotations

import math

import numpy as np

from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact
from lineshaft.evaluate.lost import FURTHEST, Compared, Side
from lineshaft.evaluate.statistics import Floats, Interval, compare, share_of
from lineshaft.evaluate.texts import Overlap, overlap
from lineshaft.records.generations import Generation, read_generations
from lineshaft.records.report import read_greedy, read_report


def compared(old: Artifact, new: Artifact) -> Compared | None:
    """The report `new` beside `old`; None where either holds no documents, or fewer than two.

    Raises ConfigError where they are about different texts, or texts cut by different tokenizers.
    """
    check_same_tokens(old, new)
    before, after = read_report(old)[0].documents, read_report(new)[0].documents
    if len(before) < 2 or not after:
        return None
    old_D4, new_D4 = np.array(before), np.array(after)
    if not np.array_equal(old_D4[:, [0, 2]], new_D4[:, [0, 2]]):
        raise ConfigError(f"{old.id} and {new.id} were measured on different texts: evaluate both on the same tokens, rows as long")
    tokens_D = old_D4[:, 2]
    loss = compare(old_D4[:, 1], new_D4[:, 1], tokens_D)
    miss = compare(np.maximum(tokens_D - old_D4[:, 3], 1e-9), tokens_D - new_D4[:, 3], tokens_D).difference
    texts, notes = _texts(old, new)
    return Compared(
        len(tokens_D),
        _side(old_D4),
        _side(new_D4),
        loss=loss.rise,
        perplexity=_of_perplexity(loss.difference),
        misses=miss,
        agreement=_agreement(old, new, tokens_D),
        texts=texts,
        notes=notes,
    )


def check_same_tokens(old: Artifact, new: Artifact) -> None:
    """Raises ConfigError, with the names of both, where two reports are about different tokens. Old reports do not tell their tokenizer."""
    cut = [report.manifest.facts.get("tokenizer_sha256") for report in (old, new)]
    ids = [report.manifest.parents.get("tokens") for report in (old, new)]
    told = f"{old.id} on {ids[0]}, {new.id} on {ids[1]}"
    if None not in cut and cut[0] != cut[1]:
        raise ConfigError(f"the reports are about text cut by different tokenizers ({told}): losses a token can't be compared")
    if ids[0] != ids[1]:
        raise ConfigError(f"the reports were measured on different tokens ({told}): evaluate both on the same ones")


def _side(found_D4: Floats) -> Side:
    _, nats, tokens, correct = found_D4.sum(0).tolist()
    return Side(nats / tokens, 1 - correct / tokens)


def _of_perplexity(difference: Interval) -> Interval:
    """The rise of exp(loss) as a share, from that of the loss in nats: its interval is the same one seen through exp."""
    middle, low, high = (math.expm1(min(end, FURTHEST)) for end in (difference.estimate, difference.low, difference.high))
    return Interval(middle, low, high, difference.error)


def _agreement(old: Artifact, new: Artifact, tokens_D: Floats) -> Interval | None:
    ours, theirs = read_greedy(new), read_greedy(old)
    if ours is None or theirs is None:
        return None
    ends = np.cumsum(tokens_D).astype(int)
    same = np.concatenate([[0], np.cumsum(ours == theirs)])
    return share_of(np.diff(same[np.concatenate([[0], ends])]), tokens_D)


def _texts(old: Artifact, new: Artifact) -> tuple[Overlap | None, list[str]]:
    """What the texts of both have in common, or why that can't be told."""
    before, after = read_generations(old), read_generations(new)
    if missing := [report.id for report, found in ((old, before), (new, after)) if not found]:
        told = "of an older version, evaluated with generate.prompts=0, or on documents that are too short; evaluate again to compare texts"
        return None, [f"No texts in {' and '.join(missing)} ({told})."]
    if [_asked(item) for item in before] != [_asked(item) for item in after]:
        return None, [f"The texts of {old.id} and {new.id} go on with different prompts: evaluate both with the same `generate` settings."]
    return overlap(before, after), []


def _asked(item: Generation) -> tuple[int, list[int], str]:
    return item.document, item.prompt_ids, item.truth
