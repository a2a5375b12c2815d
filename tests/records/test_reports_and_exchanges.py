"""Reports and exchanges come back as they were written, and refuse what they can't say."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.base.catalogue import CATALOGUE
from lineshaft.base.errors import StoreError
from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.records.exchange import Exchange, Timing, read_exchanges, write_exchanges
from lineshaft.records.report import Measured, Report, read_report, write_report

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(["\n", "\r", "\u2028", "\x85", '"', "\\", "答"])
FINITE = st.floats(allow_nan=False, allow_infinity=False)
FIXED = sorted(name for name, item in CATALOGUE.items() if not item.measured and item.instrument == "value")
TIMED = sorted(name for name, item in CATALOGUE.items() if item.measured)


def written(folder: Path, fill: Callable[[Draft], None], kind: str = "report") -> Artifact:
    store = Store(folder)
    with store.draft(kind, stage="s", version=1, config={}) as draft:
        assert isinstance(draft, Draft)
        fill(draft)
    (made,) = store.all()
    return store.open(made.id)


@settings(max_examples=20)
@given(
    st.builds(Report, subject=TEXT, format=TEXT, metrics=st.dictionaries(st.sampled_from(FIXED), FINITE), notes=st.lists(TEXT, max_size=3)),
    st.builds(
        Measured,
        metrics=st.dictionaries(st.sampled_from(TIMED), FINITE),
        samples=st.dictionaries(TEXT, st.lists(FINITE, max_size=3), max_size=2),
        machine=st.dictionaries(TEXT, TEXT | st.integers(), max_size=2),
    ),
)
def test_a_report_comes_back(report: Report, measured: Measured) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = written(Path(folder), lambda draft: write_report(draft, report, measured))
        assert read_report(made) == (report, measured)
        assert [item.name for item in made.manifest.aside_files] == ["measured.json"]


def test_what_was_measured_does_not_change_the_digest(tmp_path: Path) -> None:
    report = Report(subject="checkpoint-0", format="dense", metrics={"perplexity": 2.0})
    halves = [Measured(metrics={"load_seconds": seconds}) for seconds in (1.0, 2.0)]
    digests = {
        written(tmp_path / str(half.metrics), lambda draft, h=half: write_report(draft, report, h)).manifest.digest for half in halves
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("fixed", "timed"),
    [({"loss": 1.0}, {}), ({}, {"speed": 1.0}), ({"load_seconds": 1.0}, {}), ({}, {"perplexity": 1.0})],
)
def test_a_metric_that_is_not_catalogued_or_on_the_wrong_side_is_refused(
    tmp_path: Path, fixed: dict[str, float], timed: dict[str, float]
) -> None:
    with pytest.raises(KeyError):
        written(tmp_path, lambda draft: write_report(draft, Report(subject="c", format="f", metrics=fixed), Measured(metrics=timed)))
    assert not list(Store(tmp_path).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path: Path, value: float) -> None:
    with pytest.raises(StoreError, match="perplexity is"):
        written(
            tmp_path,
            lambda draft: write_report(draft, Report(subject="c", format="f", metrics={"perplexity": value}), Measured(metrics={})),
        )


EXCHANGES = st.builds(
    Exchange, model=TEXT, prompt=TEXT, answer=TEXT, finish_reason=TEXT, prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9)
)
TIMINGS = st.builds(Timing, ready_seconds=FINITE, first_token_seconds=FINITE, seconds=FINITE)


@settings(max_examples=20)
@given(st.lists(st.tuples(EXCHANGES, TIMINGS), max_size=4))
def test_exchanges_come_back_one_a_line(pairs: list[tuple[Exchange, Timing]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = written(Path(folder), lambda draft: write_exchanges(draft, iter(pairs)), "traffic")
        assert list(read_exchanges(made)) == pairs
        lines = made.path("exchanges.jsonl").read_bytes().decode().split("\n")
        assert [json.loads(line)["answer"] for line in lines[:-1]] == [exchange.answer for exchange, _ in pairs]
        assert [item.name for item in made.manifest.aside_files] == ["timings.jsonl"]


def test_half_a_surrogate_pair_from_a_client_is_kept_as_its_escape(tmp_path: Path) -> None:
    exchange = Exchange(model="m", prompt="\ud800 \\ud800", answer="\udfff", finish_reason="stop", prompt_tokens=1, completion_tokens=0)
    pair = exchange, Timing(ready_seconds=0.0, first_token_seconds=0.0, seconds=0.0)
    assert list(read_exchanges(written(tmp_path, lambda draft: write_exchanges(draft, [pair]), "traffic"))) == [pair]


def test_files_are_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    script = """
import sys
from lineshaft.base.store import Store
from lineshaft.records.report import Measured, Report, read_report, write_report
store = Store(sys.argv[1])
with store.draft("report", stage="s", version=1, config={"word": "\\u6587"}) as draft:
    write_report(draft, Report(subject="\\u6587", format="f", metrics={}), Measured(metrics={}))
(made,) = store.all()
assert read_report(store.open(made.id))[0].subject == "\\u6587"
"""
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
