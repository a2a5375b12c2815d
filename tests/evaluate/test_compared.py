"""Two reports beside each other: the differences by hand, and what can't be compared."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from written import models

from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.evaluate.compared import compared
from lineshaft.evaluate.lost import LINES
from lineshaft.evaluate.statistics import compare
from lineshaft.evaluate.texts import NAMES
from lineshaft.pipeline.lost import lost_rows, print_lost
from lineshaft.records.generations import Generation, write_generations
from lineshaft.records.report import Measured, Report, write_report

Documents = list[list[float]]
SCORED = [[0, 50.0, 20, 10], [1, 60.0, 30, 9]]


def report(
    store: Store,
    number: int,
    documents: Documents,
    greedy: list[int] | None = None,
    texts: list[Generation] | None = None,
    parents: dict[str, Artifact] | None = None,
    tokenizer: str | None = None,
) -> Artifact:
    with store.draft("report", stage="by_hand", version=number, config={}, parents=parents) as draft:
        assert isinstance(draft, Draft)
        draft.facts |= {"tokenizer_sha256": tokenizer} if tokenizer else {}
        write_generations(draft, texts or [])
        tokens = None if greedy is None else np.array(greedy)
        write_report(draft, Report(subject="m", format="dense", metrics={}, documents=documents), Measured(metrics={}), tokens)
    (found,) = (item.id for item in store.all() if (item.kind, item.version) == ("report", number))
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
    assert found.perplexity.estimate == pytest.approx(np.exp((costs[1] - costs[0]) / tokens.sum()) - 1)
    assert (found.old.perplexity, found.new.perplexity) == pytest.approx(np.exp(costs / tokens.sum()))
    per_token = compare(*np.array([old, new])[:, :, 1], tokens).difference
    assert (found.perplexity.low, found.perplexity.high) == pytest.approx((np.expm1(per_token.low), np.expm1(per_token.high)))
    assert "50 documents" in found.caption()
    assert found.table()["greedy_agreement"]["estimate"] == found.agreement.estimate
    assert found.table()["loss_rise_share"] == {
        "old": pytest.approx(costs[0] / tokens.sum()),
        "new": pytest.approx(costs[1] / tokens.sum()),
        "estimate": found.loss.estimate,
        "low": found.loss.low,
        "high": found.loss.high,
        "verdict": "worse",
    }


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
    assert found is not None and found.agreement is None and "greedy_agreement" not in found.table()
    with pytest.raises(ConfigError, match="were measured on different texts"):
        compared(full, report(store, 3, [[0, 50.0, 20, 10], [2, 60.0, 30, 9]]))


def test_texts_are_compared_where_both_reports_hold_them(tmp_path: Path) -> None:
    store, (old, new) = Store(tmp_path), models(4, 12)
    found = compared(report(store, 1, SCORED, texts=old), report(store, 2, SCORED, texts=new))
    assert found is not None and found.texts is not None and found.notes == []
    table = found.table()
    assert [name for name in table if name in LINES] == [name for name in LINES if name != "greedy_agreement"]
    assert (table["prompts"], table["script"], table["bleu_signature"]) == (12, "latin", found.texts.signature)
    assert table["bleu_drop"]["estimate"] == pytest.approx(table["bleu_drop"]["old"] - table["bleu_drop"]["new"])
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert "12 prompts" in found.caption() and found.texts.signature in found.caption()


def test_reports_of_an_older_version_are_compared_without_texts_and_say_so(tmp_path: Path) -> None:
    store, (old, _) = Store(tmp_path), models(4, 12)
    full, bare = report(store, 1, SCORED, texts=old), report(store, 2, SCORED)
    for one, other in ((full, bare), (bare, full)):
        found = compared(one, other)
        assert found is not None and found.texts is None and found.verdict == "no difference seen"
        assert len(found.notes) == 1 and found.notes[0].startswith(f"No texts in {bare.id} (of an older version")
    both = compared(bare, report(store, 3, SCORED))
    assert both is not None and both.notes[0].startswith(f"No texts in {bare.id} and report-")


def test_texts_for_other_prompts_are_not_compared(tmp_path: Path) -> None:
    store, (old, _) = Store(tmp_path), models(4, 12)
    full = report(store, 1, SCORED, texts=old)
    for number, others in enumerate((old[:-1], [old[0].model_copy(update={"prompt_ids": [9]}), *old[1:]]), 2):
        found = compared(full, report(store, number, SCORED, texts=others))
        assert found is not None and found.texts is None and "go on with different prompts" in found.notes[0]


def test_different_tokens_and_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in (1, 2):
        with store.draft("tokens", stage="by_hand", version=number, config={}) as draft:
            assert isinstance(draft, Draft)
    tokens = [store.open(item.id) for item in store.all() if item.kind == "tokens"]
    first = report(store, 1, SCORED, parents={"tokens": tokens[0]}, tokenizer="aa")
    other = report(store, 2, SCORED, parents={"tokens": tokens[1]}, tokenizer="aa")
    strange = report(store, 3, SCORED, parents={"tokens": tokens[1]}, tokenizer="bb")
    with pytest.raises(ConfigError, match=f"measured on different tokens .{first.id} on {tokens[0].id}, {other.id} on {tokens[1].id}"):
        compared(first, other)
    with pytest.raises(ConfigError, match=f"cut by different tokenizers .{first.id} on {tokens[0].id}, {strange.id} on {tokens[1].id}"):
        compared(first, strange)
    assert compared(first, report(store, 4, SCORED, parents={"tokens": tokens[0]})) is not None  # an old one does not tell its tokenizer


def test_models_ever_so_far_apart_still_have_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = compared(report(store, 1, SCORED), report(store, 2, [[0, 5e4, 20, 0], [1, 9e5, 30, 0]]))
    assert found is not None
    json.dumps(found.table(), allow_nan=False)


def test_the_table_shows_what_the_json_holds_and_marks_what_is_worse(tmp_path: Path) -> None:
    store, (old, new) = Store(tmp_path), models(4, 12)
    worse = [[number, 1.5 * nats, count, right - 2] for number, nats, count, right in SCORED * 8]
    worse = [[number, *line[1:]] for number, line in enumerate(worse)]
    before = [[number, *line[1:]] for number, line in enumerate(SCORED * 8)]
    base = report(store, 1, before, [1] * 400, old)
    pairs = [("int4", compared(base, report(store, 2, worse, [1] * 400, new))), ("bare", compared(base, report(store, 3, before)))]
    rows = {row.name: row for row in lost_rows(pairs)}
    assert list(rows) == list(LINES)
    loss, bare = rows["loss_rise_share"].cells
    assert (loss.text, loss.verdict, bare.text, bare.verdict) == ("+50.00 % (+50.00 to +50.00)", "worse", "+0.00 % (+0.00 to +0.00)", "")
    texts = pairs[0][1].texts
    drop = texts.drop["bleu"]
    assert rows["bleu_drop"].cells[0].text == f"{-drop.estimate:+.1f} ({-drop.high:+.1f} to {-drop.low:+.1f})"
    assert rows["bleu_drop"].base == f"{texts.old['bleu']:.1f}" and rows["same_text"].base == ""
    assert rows["greedy_agreement"].cells[0].text == "100.0 % (100.0 to 100.0)"
    assert [rows[f"{name}_between"].cells[1] for name in NAMES] == [None] * 4
    file = io.StringIO()
    print_lost("base", pairs, Console(file=file, width=100))
    lines = file.getvalue().splitlines()
    assert all(len(line) <= 100 for line in lines) and "\u2026" not in file.getvalue()
    assert lines[0].split() == ["lost", "base", "int4", "bare"]
    assert next(line for line in lines if line.startswith("loss, nats/token")).split()[2:] == (
        ["2.2000", "+50.00", "%", "(+50.00", "to", "+50.00)", "worse", "+0.00", "%", "(+0.00", "to", "+0.00)"]
    )
    assert "No texts in report-" in file.getvalue()
