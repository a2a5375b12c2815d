"""The HTML page says what the artifacts say, stands alone, and lets nothing break out of it."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from finished_run import DROPPED, HOSTILE, NODES, finished, losses

from lineshaft.base.catalogue import CATALOGUE
from lineshaft.base.errors import LineshaftError
from lineshaft.pipeline.lost import lost_rows
from lineshaft.pipeline.outcome import Node, Outcome
from lineshaft.pipeline.page.lineage import lineage_figure, place
from lineshaft.pipeline.page.page import render_page, write_page
from lineshaft.pipeline.page.plots import loss_figure
from lineshaft.pipeline.page.units import SHARES, cell, change, duration, heading, percent, printable, shown, significant, size

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """An independent reading of the page: tags, attributes, text, table cells; complains about bad nesting."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.values: dict[str, list[tuple[str, str]]] = {}
        self._row = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._row = (attributes.get("id") or "").removeprefix("metric-")
        if tag == "data":
            self.values.setdefault(self._row, []).append((attributes.get("value") or "", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            value, text = self.values[self._row][-1]
            self.values[self._row][-1] = (value, text + data)
        if "style" not in self.open:
            self.text += data


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def figure(page: str, name: str) -> ElementTree.Element:
    return next(svg for svg in svgs(page) if (svg.get("aria-labelledby") or "").startswith(name))


def test_what_was_lost_stands_in_a_table_of_its_own(outcome: Outcome):
    page = render_page(outcome)
    rows = lost_rows(outcome.comparisons)
    assert [row.name for row in rows][:3] == ["loss_rise_share", "perplexity_rise_share", "misses_rise"] and len(rows) == 12
    for row in rows:
        (found,) = re.findall(rf'<tr id="lost-{row.name}">.*?</tr>', page, re.DOTALL)
        (only,) = row.cells
        told = f"{only.text}, {only.verdict}" if only.verdict else only.text
        assert re.findall(r">([^<>\n]+)<", found) == [part for part in (row.words, row.base, told) if part]
    assert "over 30 documents, and over 6 prompts for texts" in Reader(page).text
    assert "lost-table" not in render_page(Outcome("part", 1, [node for node in outcome.nodes if node.name != "evaluate_compressed"]))


def test_every_number_of_the_reports_stands_in_the_table(outcome: Outcome):
    read = Reader(render_page(outcome))
    for name in CATALOGUE:
        exact = []
        for node in ("evaluate_base", "evaluate_compressed"):
            artifact = outcome.node(node).artifact
            halves = [json.loads(artifact.path(file).read_text()) for file in ("report.json", "measured.json")]
            exact += [half["metrics"][name] for half in halves if name in half["metrics"]]
        assert [json.loads(value) for value, _ in read.values.get(name, [])] == exact
        assert [text for _, text in read.values.get(name, [])] == [cell(name, value) for value in exact]
        assert not exact or CATALOGUE[name].help in read.text


def test_every_artifact_is_listed_with_id_digest_and_config(outcome: Outcome):
    text = Reader(render_page(outcome)).text
    for node in outcome.nodes:
        made = node.artifact.manifest
        assert made.id in text and made.digest in text and node.name in text
    assert "optimizer.lr" in text and "0.003" in text and "[0.9, 0.95]" in text
    assert "documents/a.md" in text


def test_the_machine_and_its_versions_are_named_once_when_both_ran_there(outcome: Outcome):
    text = Reader(render_page(outcome)).text
    assert text.count("Some Processor 9000 <b>") == 1
    assert "versions.torch" in text and "Measured here: base, compressed." in text


def test_hostile_text_is_shown_and_does_nothing(outcome: Outcome):
    page = render_page(outcome)
    read = Reader(page)
    assert not {tag for tag, _ in read.tags} & {"script", "b", "iframe", "object", "base", "form"}
    assert "<script>alert('太好了')</script> & \ufffd[31mred\ufffd[0m \ufffdevil" in read.text
    assert "\x1b" not in page and "\u202e" not in page


def test_the_head_says_what_was_trained_and_the_plots_what_it_was_trained_on(outcome: Outcome):
    text = Reader(render_page(outcome)).text
    assert "8 stages, 1 of them cached, seed 7." in text
    assert "4,812,544 parameters; 3,105,024 active parameters; 5,322 tokens/s in training; computed in bfloat16." in text
    assert "20,513 documents read, 17,000 kept (82.9 %); heldout: 360; train: 16,640." in text


def test_a_hostile_recipe_name_stays_in_its_place(outcome: Outcome):
    read = Reader(render_page(Outcome('</title><script>"', 1, outcome.nodes)))
    assert "script" not in {tag for tag, _ in read.tags}


def test_hostile_reasons_and_formats_do_not_break_the_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(DROPPED, "</svg><script>\x00", 400)
    page = render_page(finished(tmp_path))
    assert "</svg><script>\ufffd" in "".join(figure(page, "dropped").itertext())
    assert "script" not in {tag for tag, _ in Reader(page).tags}


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path, outcome: Outcome):
    """A report of someone else's tool may hold half a surrogate pair, written as an escape."""
    write_page(Outcome("half a pair: \ud83d!", 1, outcome.nodes), tmp_path / "report.html")
    assert "half a pair: \ufffd!" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_runs_nothing(outcome: Outcome):
    page = render_page(outcome)
    for tag, attributes in Reader(page).tags:
        assert not {"src", "href", "srcset", "action", "data", "poster"} & attributes.keys() or tag == "data"
        assert not [name for name in attributes if name.startswith("on")]
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_chinese_is_declared_and_stored_as_utf8(tmp_path: Path, outcome: Outcome):
    write_page(outcome, tmp_path / "new" / "report.html")
    raw = (tmp_path / "new" / "report.html").read_bytes()
    assert b'<meta charset="utf-8">' in raw[:1024] and "请回答".encode() in raw
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_same_artifacts_give_the_same_bytes_wherever_they_lie(tmp_path: Path):
    pages = [render_page(finished(tmp_path / name)) for name in ("one", "another")]
    assert pages[0] == pages[1]
    assert str(tmp_path) not in pages[0]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch):
    write_page(outcome, tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LineshaftError, match="disk is full"):
        write_page(Outcome("other", 1, outcome.nodes), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    assert len(list(tmp_path.glob("*.html*"))) == 1


def test_drawings_are_well_formed_and_say_what_they_show(outcome: Outcome):
    drawn = svgs(render_page(outcome))
    assert len(drawn) == 5
    ids = [item.get("id") for svg in drawn for item in svg.iter() if item.get("id")]
    assert len(set(ids)) == len(ids)
    for svg in drawn:
        assert svg.get("role") == "img" and svg.find("title").text and len(svg.find("desc").text) > 40
        assert set((svg.get("aria-labelledby") or "").split()) == {svg.find("title").get("id"), svg.find("desc").get("id")}


def test_everything_drawn_lies_inside_its_drawing(outcome: Outcome):
    for svg in svgs(render_page(outcome)):
        _, _, width, height = map(float, svg.get("viewBox").split())
        for item in svg.iter():
            for name, most in (("x", width), ("y", height)):
                assert 0 <= float(item.get(name, 0)) <= most
            for path in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", item.get("d", "")):
                assert 0 <= float(path[0]) <= width and 0 <= float(path[1]) <= height


def test_the_loss_curve_has_every_logged_step_and_both_levels(outcome: Outcome):
    svg = figure(render_page(outcome), "loss")
    curve = next(item.get("d") for item in svg.iter("path") if "faint" in (item.get("class") or ""))
    assert len(re.split("[ML]", curve)) - 1 == len(losses())
    labels = [item.text for item in svg.iter("text") if item.get("class") == "label"]
    assert labels == ["held-out: 2.3146 nats/token", "bigram, held-out: 3.9810 nats/token"]
    downs = [float(item.get("d").split()[1].partition("H")[0]) for item in svg.iter("path") if "level" in (item.get("class") or "")]
    assert downs[0] > downs[1]  # the smaller loss is drawn lower


def test_the_latency_curve_is_marked_with_the_reports_own_quantiles(outcome: Outcome):
    tips = [item.text for item in figure(render_page(outcome), "latency").iter("title")]
    for variant in outcome.variants():
        for number in (50, 90, 99):
            assert f"{variant.label}: P{number} {duration(variant.metrics[f'latency_p{number}_seconds'])}" in tips


def test_size_against_quality_has_a_marker_for_each_variant_and_the_bigram(tmp_path: Path):
    svg = figure(render_page(finished(tmp_path, extra=2)), "quality")
    tips = [item.text for item in svg.iter("title")][1:]
    assert [tip.partition(":")[0] for tip in tips] == ["base", "compressed", "compressed_2", "compressed_3"]
    assert tips[0] == "base: 18.38 MiB, 1.2031 bits/byte"
    assert "bigram: 2.0694" in [item.text for item in svg.iter("text")]


def test_reasons_are_drawn_from_the_most_frequent_without_the_empty_ones(outcome: Outcome):
    texts = [item.text for item in figure(render_page(outcome), "dropped").iter("text")]
    assert texts[::2] == ["too short", "exact duplicate", "low quality", "control characters"]
    assert texts[1] == "2,210 (10.8 %)"


def test_lineage_has_an_arrow_into_a_box_for_each_parent_of_each_artifact(outcome: Outcome):
    svg = figure(render_page(outcome), "lineage")
    arrows = [item for item in svg.iter("path") if item.get("class") == "arrow"]
    assert len(arrows) == sum(len(set(node.artifact.manifest.parents.values())) for node in outcome.nodes)
    texts = [item.text for item in svg.iter("text")]
    for node in outcome.nodes:
        assert node.artifact.id in texts and f"digest {node.artifact.manifest.digest[:16]}" in texts
    assert texts.count("cached") == 1 and texts.count("1.50 s") == 7


def test_boxes_and_lanes_of_a_row_never_overlap(tmp_path: Path):
    nodes = finished(tmp_path, extra=3).nodes
    rows = place({node.artifact.id: sorted(node.artifact.manifest.parents.values()) for node in nodes})
    assert sum(not slot.lane for row in rows for slot in row) == len(nodes)
    for row in rows:
        for left, right in itertools.pairwise(row):
            assert left.x + left.width / 2 < right.x - right.width / 2


def test_a_parent_from_outside_the_run_is_drawn_as_such(outcome: Outcome):
    alone = Outcome("part", 1, [node for node in outcome.nodes if node.name in ("compress", "evaluate_compressed")])
    svg = ElementTree.fromstring(lineage_figure(alone).svg)
    texts = [item.text for item in svg.iter("text")]
    assert texts.count("from outside this run") == 2  # the tokens and the trained checkpoint
    assert outcome.node("train").artifact.id in texts


@pytest.mark.parametrize("without", [*NODES[2:], "nothing"])
def test_a_recipe_may_leave_stages_out(tmp_path: Path, outcome: Outcome, without: str):
    page = render_page(Outcome("part", 1, [node for node in outcome.nodes if node.name != without]))
    read = Reader(page)
    assert all(svg is not None for svg in svgs(page))
    assert ("What the served model answered" in read.text) == (without != "serve")


@pytest.mark.parametrize("kept", NODES)
def test_a_run_of_a_single_stage_has_a_page(outcome: Outcome, kept: str):
    read = Reader(render_page(Outcome("one", 1, [node for node in outcome.nodes if node.name == kept])))
    assert read.text.count(outcome.node(kept).artifact.id) >= 2  # in the drawing and in the table
    if kept != "train":
        assert "No training history" in read.text
    if not kept.startswith("evaluate"):
        assert "No latency samples" in read.text and "All metrics" not in read.text


def test_a_run_of_nothing_has_a_page_without_empty_frames():
    page = render_page(Outcome("none", 1, []))
    assert svgs(page) == [] and "This recipe has no data stage." in Reader(page).text


def test_the_uncompressed_variant_comes_first_whatever_the_order(outcome: Outcome):
    backwards = Outcome("back", 1, list(reversed(outcome.nodes)))
    assert [item.label for item in backwards.variants()] == ["base", "compressed"]


def test_a_loss_that_is_no_number_is_left_out_of_the_curve(outcome: Outcome, monkeypatch: pytest.MonkeyPatch):
    rows = [{"step": 1, "loss": 8.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 7.0}]
    monkeypatch.setattr(Outcome, "history", lambda _: rows)
    assert "the 2 logged steps" in loss_figure(outcome, outcome.variants()).caption


def test_equal_outcomes_differ_on_the_page_only_by_what_was_measured(outcome: Outcome):
    slower = Outcome("quickstart", 7, [Node(node.name, node.artifact, node.cached, node.seconds * 2) for node in outcome.nodes])
    assert render_page(slower).replace("3.00 s", "1.50 s") == render_page(outcome)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("weights_bytes", 19_272_704.0, "18.38 MiB"),
        ("kv_bytes_per_token", 1152.0, "1.125 KiB"),
        ("latency_p50_seconds", 0.1502, "150 ms"),
        ("load_seconds", 1.824, "1.82 s"),
        ("next_token_accuracy", 0.5182, "51.8 %"),
        ("loss_nats_per_token", 2.31457, "2.3146 nats/token"),
        ("parameters", 4_812_544.0, "4,812,544"),
        ("usd_per_million_tokens", 0.03071, "$0.0307"),
        ("perplexity", 10.1206, "10.12"),
    ],
)
def test_values_are_shown_in_the_units_people_use(name: str, value: float, text: str):
    assert shown(name, value) == text


@pytest.mark.parametrize(
    ("name", "before", "after", "text", "verdict"),
    [
        ("weights_bytes", 100.0, 25.0, "-75.0 %", "better"),
        ("decode_tokens_per_second", 100.0, 90.0, "-10.0 %", "worse"),
        ("next_token_accuracy", 0.52, 0.5231, "+0.31 pp", "better"),
        ("next_token_accuracy", 0.5, 0.49999, "+0.00 pp", "worse"),
        ("loss_nats_per_token", 2.0, 2.002, "+0.10 %", "worse"),
        ("parameters", 10.0, 11.0, "+10.0 %", ""),
        ("perplexity", 3.0, 3.0, "same", ""),
        ("perplexity", 3.0, float("inf"), "n/a", ""),
        ("load_seconds", 0.1, 2.0, "20x", "worse"),
    ],
)
def test_a_change_says_how_much_and_whether_it_is_good(name: str, before: float, after: float, text: str, verdict: str):
    moved = change(name, before, after)
    assert (moved.text, moved.verdict) == (text, verdict)


def test_every_metric_has_a_heading_of_its_own_and_shares_are_in_the_catalogue():
    headings = [heading(name) for name in CATALOGUE if not name.startswith(("vllm:", "lineshaft:"))]
    assert len(set(headings)) == len(headings)
    assert CATALOGUE.keys() >= SHARES
    assert heading("batch_decode_tokens_per_second") == "batch decode, tokens/s"


def test_numbers_keep_their_significant_digits_in_every_range():
    assert [significant(value, 3) for value in (1234.6, 12.345, 0.012345, 0.0)] == ["1,235", "12.3", "0.0123", "0"]
    assert [size(value) for value in (12, 2048, 3 * 2**30, 2.0**50)] == ["12 B", "2.000 KiB", "3.000 GiB", "1,024 TiB"]
    assert [duration(value) for value in (0.0021, 1.5, 300)] == ["2.10 ms", "1.50 s", "5.00 min"]
    assert [percent(value) for value in (1, 0.0123, 0)] == ["100.0 %", "1.23 %", "0.00 %"]


def test_the_hostile_sample_is_really_hostile():
    assert "<script>" in HOSTILE and printable(HOSTILE) != HOSTILE
