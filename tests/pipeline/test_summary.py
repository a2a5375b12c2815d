"""The terminal table: the same numbers as the page, plain where nobody looks, harmless whatever a model says."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from finished_run import BASE, COMPRESSED, DROPPED, NODES, finished
from rich.console import Console

from lineshaft.pipeline.outcome import Outcome
from lineshaft.pipeline.page.units import cell, heading
from lineshaft.pipeline.summary import print_summary, summary_json


def printed(outcome: Outcome, width: int = 100, *, terminal: bool = False, page: Path | None = None) -> str:
    file = io.StringIO()
    print_summary(
        outcome, Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None), page=page
    )
    return file.getvalue()


def row(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(start))
    return line.removeprefix(start).split()


def test_each_metric_has_a_row_with_both_values_and_the_change(outcome: Outcome):
    text = printed(outcome)
    assert row(text, "weights ") == ["18.38", "MiB", "5.001", "MiB", "-72.8", "%", "better"]
    assert row(text, "loss, nats/token") == ["2.3146", "2.3170", "+0.11", "%", "worse"]
    assert row(text, "quantised share of FP32") == ["-", "25.9", "%"]
    for name in BASE:
        assert row(text, heading(name))[: len(cell(name, BASE[name]).split())] == cell(name, BASE[name]).split()
        assert cell(name, COMPRESSED[name]) in text


def test_what_was_lost_follows_with_its_intervals(outcome: Outcome):
    text = printed(outcome)
    ((label, found),) = outcome.comparisons
    assert next(line for line in text.splitlines() if line.startswith("lost")).split() == ["lost", "base", label]
    low, middle, high = (f"{100 * end:+.2f}" for end in (found.loss.low, found.loss.estimate, found.loss.high))
    assert row(text, "loss, nats/token  ")[:2] == ["2.3146", "2.3170"]  # of the metrics; the line below is that of the losses
    assert f"{middle} % ({low} to {high})" in text
    bleu = found.texts.between["bleu"]
    assert f"{bleu.estimate:.1f} ({bleu.low:.1f} to {bleu.high:.1f})" in text
    assert "over 30 documents, and over 6 prompts for texts" in " ".join(text.split())
    assert json.loads(json.dumps(summary_json(outcome)))["comparisons"][0]["bleu_between"]["estimate"] == bleu.estimate


def test_stages_come_first_with_their_ids_and_times(outcome: Outcome):
    lines = printed(outcome).splitlines()
    assert lines[0] == "quickstart, seed 7"
    assert [line.split()[0] for line in lines[1:9]] == [node.name for node in outcome.nodes]
    assert lines[2].split() == ["tokenizer", outcome.node("tokenizer").artifact.id, "cached"]
    assert lines[1].split() == ["data", outcome.node("data").artifact.id, "1.50", "s"]


def test_the_baseline_the_drops_the_answer_and_the_page_follow(outcome: Outcome):
    text = printed(outcome, page=Path("runs/report.html"))
    flat = " ".join(text.split())
    assert "1.2031 bits a byte and a bigram model of the same tokens 2.0694: 41.9 % less." in flat
    assert "17,000 of 20,513 documents kept (82.9 %); dropped: 2,210 too short, 1,204 exact duplicate, 96 low quality" in flat
    assert "What does <b>json.dumps</b> do? 请回答" in text
    assert text.rstrip().endswith("runs/report.html")
    assert "never happened" not in text and DROPPED["never_happened"] == 0


@pytest.mark.parametrize(("width", "extra"), [(100, 0), (100, 3), (80, 0)])
def test_the_table_fits_the_terminal_without_breaking_a_row(tmp_path: Path, width: int, extra: int):
    text = printed(finished(tmp_path, extra=extra), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert row(text, "bits per byte below bigram")[:2] == ["41.9", "%"]
    assert "\u2026" not in text


def test_more_variants_than_fit_get_a_second_table_against_the_same_base(tmp_path: Path):
    text = printed(finished(tmp_path, extra=2))
    headers = [line.split() for line in text.splitlines() if line.startswith("metric")]
    assert headers == [["metric", "base", "compressed", "change", "compressed_2", "change"], ["metric", "base", "compressed_3", "change"]]


def test_without_a_terminal_there_are_no_escape_sequences(outcome: Outcome):
    assert "\x1b" not in printed(outcome)
    assert "\x1b[32m" in printed(outcome, terminal=True)


def test_an_answer_cannot_steer_the_terminal_or_be_read_as_markup(tmp_path: Path):
    answer = "\x1b]0;owned\x07 \x1b[2J [bold red]not markup[/] \u202e :smile:"
    for terminal in (False, True):
        text = printed(finished(tmp_path / str(terminal), answer=answer), terminal=terminal)
        assert "\x1b]0" not in text and "\x1b[2J" not in text and "\x07" not in text and "\u202e" not in text
        assert "[bold red]not markup[/]" in text and ":smile:" in text


def test_an_empty_answer_is_said_to_be_empty(tmp_path: Path):
    assert "(nothing)" in printed(finished(tmp_path, answer=" \n"))


@pytest.mark.parametrize("kept", [[], ["data"], ["train"], ["train", "evaluate_base"], ["evaluate_compressed"], list(NODES[:6])])
def test_a_recipe_may_leave_stages_out(outcome: Outcome, kept: list[str]):
    part = Outcome("part", 1, [node for node in outcome.nodes if node.name in kept])
    text = printed(part)
    assert ("metric" in text) == any(name.startswith("evaluate") for name in kept)
    assert ("change" in text) == ({"evaluate_base", "evaluate_compressed"} <= set(kept))
    assert "asked" not in text
    json.dumps(summary_json(part), allow_nan=False)


def test_the_json_holds_exact_values_and_survives_a_round_trip(outcome: Outcome):
    table = json.loads(json.dumps(summary_json(outcome)))
    assert [stage["name"] for stage in table["stages"]] == [node.name for node in outcome.nodes]
    base, compressed = table["reports"]
    assert base["metrics"].items() >= BASE.items() and compressed["metrics"].items() >= COMPRESSED.items()
    assert base["checkpoint"] == outcome.node("train").artifact.id
    assert table["corpus"]["dropped"] == DROPPED
    assert table["exchanges"][0]["completion_tokens"] == 48
