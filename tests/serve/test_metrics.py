"""What /metrics shows: bounded labels, names that the page lists, counters that never go back, a text that Prometheus takes."""

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from world import MODEL, serving

from lineshaft.base.catalogue import CATALOGUE
from lineshaft.sched.load import Load
from lineshaft.serve.ledger import Ledger, Times
from lineshaft.serve.metrics import Metrics

SERVER = {name: entry for name, entry in CATALOGUE.items() if entry.instrument != "value"}
BOUNDED = {
    "model_name": re.compile(re.escape(MODEL)),
    "finished_reason": re.compile("stop|length|abort|error"),
    "process": re.compile("front|engine"),
    "status": re.compile("[45][0-9][0-9]"),
    "le": re.compile(r"[0-9.]+|\+Inf"),
}


def totals(metrics):
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples}


@pytest.fixture(scope="module")
def exposed():
    with serving(FakeEngine()) as world:
        ask = {"model": MODEL, "prompt": "hello", "max_tokens": 8}
        assert [world.post("/v1/completions", body)[0] for body in (ask, ask | {"max_tokens": -1})] == [200, 400]
        return world.call("GET", "/metrics")[2]


def test_labels_are_bounded(exposed):
    samples = [sample for family in text_string_to_metric_families(exposed) for sample in family.samples]
    assert len(samples) > len(SERVER)
    for sample in samples:
        for label, value in sample.labels.items():
            assert BOUNDED[label].fullmatch(value), sample


def test_every_metric_of_the_catalogue_is_exposed_and_no_other(exposed):
    assert {family.name for family in text_string_to_metric_families(exposed)} == SERVER.keys()


def test_the_page_about_serving_lists_every_metric_and_no_other():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert set(re.findall(r"`((?:vllm|lineshaft):\w+)`", page)) == SERVER.keys()


def test_outcomes_are_there_before_the_first_request():
    metrics = Metrics(MODEL)
    Ledger(metrics, lambda: 0)
    assert [totals(metrics)["vllm:request_success_total", *sorted((MODEL, reason))] for reason in ("stop", "length", "abort", "error")] == [
        0
    ] * 4


def test_counters_never_go_back_when_another_engine_begins_at_zero():
    metrics = Metrics(MODEL)
    ledger, seen = Ledger(metrics, lambda: 0), [totals(metrics)]
    full = Load(preemptions=3, prefix_queried_tokens=50, prefix_hit_tokens=20, busy_seconds=2.0)
    for load in (full, None, Load(), Load(preemptions=1, busy_seconds=0.5)):
        if load is None:
            ledger.lost()
            ledger.loaded(again=True)
        else:
            ledger.stepped(load, 5)
        seen.append(totals(metrics))
    for before, after in pairwise(seen):
        assert all(after[key] >= value for key, value in before.items() if key[0].endswith(("_total", "_count", "_bucket", "_sum")))
    assert seen[-1]["vllm:num_preemptions_total", MODEL] == 4
    assert seen[-1]["lineshaft:engine_busy_seconds_total", MODEL] == 2.5
    assert seen[-1]["lineshaft:engine_restarts_total", MODEL] == 1


def test_the_times_of_a_request_add_up():
    metrics = Metrics(MODEL)
    ledger, times = Ledger(metrics, lambda: 0), Times(arrived=10.0)
    ledger.started(times, 11.0, 7)
    for now in (13.0, 14.0, 16.0):
        ledger.token(times, now)
    ledger.ended(times, "length")
    sums = {name: totals(metrics)[f"vllm:{name}_sum", MODEL] for name in (
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "e2e_request_latency_seconds",
        "time_to_first_token_seconds", "inter_token_latency_seconds", "request_generation_tokens", "request_prompt_tokens",
    )}  # fmt: skip
    assert list(sums.values()) == [1.0, 2.0, 3.0, 6.0, 3.0, 3.0, 3.0, 7.0]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on PATH to lint the exposition with")
def test_promtool_has_nothing_to_say_but_what_vllms_names_imply(exposed):
    told = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True, text=True, check=False)
    assert [line for line in told.stderr.splitlines() if "should not contain ':'" not in line and "_total" not in line] == []
