"""The picture of a measurement under load."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from lineshaft.base.config import load
from lineshaft.evaluate.load.bench import LoadConfig, Outcome, Run
from lineshaft.evaluate.load.generate import Sent
from lineshaft.evaluate.load.measure import Slo, measure
from lineshaft.evaluate.load.record import Record
from lineshaft.evaluate.load.search import Found, ProbeResult
from lineshaft.pipeline.page.load import MOST_MARKERS, load_picture

SVG = "{http://www.w3.org/2000/svg}"


def outcome(answered: int, failed: int = 0, found: Found | None = None) -> Outcome:
    records = [Record(n, n / 10, sent=n / 10, tokens_at=[n / 10 + 0.2, n / 10 + 0.3], ended=n / 10 + 0.3) for n in range(answered)]
    records += [Record(n, n / 10, sent=n / 10, error="http 500") for n in range(answered, answered + failed)]
    run = Run(10.0, measure(Sent(records, [], 99.0), Slo(), 0.0, 10.0), records, False)
    return Outcome(load(LoadConfig, {}), run, [run], found)


def drawn(given: Outcome) -> tuple[ElementTree.Element, list[str]]:
    text = load_picture(given)
    root = ElementTree.fromstring(text.replace("<svg viewBox", '<svg xmlns="http://www.w3.org/2000/svg" viewBox'))
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    return root, [item.text or "" for item in root.iter(f"{SVG}text")]


def test_it_shows_the_distribution_and_the_run() -> None:
    root, texts = drawn(outcome(50))
    assert "Latency at 10 requests/s, markers at P50, P90 and P99" in texts
    assert "Latency over the run" in texts
    assert len([item for item in root.iter(f"{SVG}path") if "marker" in item.get("class", "")]) == 2 * 50 + 6 + 2 * 2


def test_failed_requests_have_a_mark_of_their_own() -> None:
    assert "failed" in drawn(outcome(5, failed=3))[1]


def test_a_long_run_makes_no_endless_file() -> None:
    assert load_picture(outcome(20 * MOST_MARKERS)).count("<path") < 2 * MOST_MARKERS + 100


@pytest.mark.parametrize("failed", [1, 5])
def test_a_run_without_answers_can_still_be_drawn(failed: int) -> None:
    assert "Latency over the run" in drawn(outcome(0, failed=failed))[1]


@pytest.mark.parametrize(("rate", "title"), [(8.0, "Highest rate within the SLO: 8 requests/s"), (None, "No rate met the SLO")])
def test_a_search_shows_its_probes(rate: float | None, title: str) -> None:
    probes = [ProbeResult(8.0, 100, 100), ProbeResult(16.0, 3, 100)]
    assert title in drawn(outcome(50, found=Found(rate, 16.0, "slo", 0.02, probes)))[1]


def test_a_search_that_saw_nothing_can_still_be_drawn() -> None:
    assert "No rate met the SLO" in drawn(outcome(0, failed=1, found=Found(None, None, "interrupted", 0.02, [])))[1]
