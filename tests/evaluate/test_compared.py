"""Two reports beside each other: the differences by hand, and what can't be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.evaluate.compared import compared
from lineshaft.records.report import Measured, Report, write_report

Documents = list[list[float]]


def report(store: Store, number: int, documents: Documents, greedy: list[int] | None = None) -> Artifact:
    with store.draft("report", stage="by_hand", version=number, config={}) as draft:
        assert isinstance(draft, Draft)
        tokens = None if greedy is None else np.array(greedy)
        write_report(draft, Report(subject="m", format="dense", metrics={}, documents=documents), Measured(metrics={}), tokens)
    (found,) = (item.id for item in store.all() if item.version == number)
    return store.open(found)


def test_differences_are_those_of_the_documents(tmp_path: Path) -> None:
    store, rng = Store(tmp_path), np.random.default_rng(0)
    tokens = rng.integers(20, 60, 50)
    old = [[n, 2.0 * count + rng.normal(), count, count // 2] for n, count in enumerate(tokens.tolist())]
    new = [[n, 1.03 * nats + 0.1 * rng.normal(), count, right - 1] for n, nats, count, right in old]
    ours = rng.integers(0, 9, tokens.sum())
    theirs = np.where(rng.random(tokens.sum()) < 0.1, 9, ours)
    found = compared(report(store, 1, old, ours.tolist()), report(store, 2, new, theirs.tolist()))
    assert found is not None and found.agreement is not None
    costs = np.array([old, new])[:, :, 1].sum(1)
    assert found.loss.estimate == pytest.approx(costs[1] / costs[0] - 1)
    assert found.loss.low < 0.03 < found.loss.high < 0.033 and found.verdict == "worse"
    assert found.misses.estimate == pytest.approx(50 / tokens.sum())
    assert found.agreement.estimate == pytest.approx((ours == theirs).mean())
    assert found.agreement.low < found.agreement.estimate < found.agreement.high
    assert f"loss {found.loss.estimate:+.2%}" in found.sentence() and "50 documents" in found.sentence()
    assert found.table()["greedy_agreement"]["estimate"] == found.agreement.estimate


def test_the_same_model_is_no_worse_and_agrees_with_itself(tmp_path: Path) -> None:
    store, rows = Store(tmp_path), [[n, 50.0 + n, 20, 10] for n in range(9)]
    found = compared(report(store, 1, rows, [1] * 180), report(store, 2, rows, [1] * 180))
    assert found is not None and found.agreement is not None
    assert (found.verdict, found.loss.high, found.agreement.low) == ("no difference seen", 0, 1)


def test_reports_without_documents_say_nothing_and_different_texts_are_refused(tmp_path: Path) -> None:
    store, rows = Store(tmp_path), [[0, 50.0, 20, 10], [1, 60.0, 30, 9]]
    full, bare = report(store, 1, rows), report(store, 2, [])
    assert compared(full, bare) is None and compared(bare, full) is None
    found = compared(full, full)
    assert found is not None and found.agreement is None and "greedy" not in found.sentence()
    with pytest.raises(ConfigError, match="were measured on different texts"):
        compared(full, report(store, 3, [[0, 50.0, 20, 10], [2, 60.0, 30, 9]]))
