"""The drawings: ticks are round and cover the data, labels keep apart, text can't break out."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lineshaft.pipeline.page.plots import smoothed, steps
from lineshaft.pipeline.page.svg import Axis, Drawing, Plot, bars, nice_ticks, shortened, spread, thinned, tick_text

numbers = st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-12)


@given(numbers, numbers, st.integers(2, 12))
def test_ticks_cover_the_interval_evenly_with_round_numbers(one: float, other: float, wanted: int):
    low, high = min(one, other), max(one, other)
    ticks = nice_ticks(one, other, wanted)
    assert ticks[0] <= low and high <= ticks[-1]
    assert 2 <= len(ticks) <= wanted + 2
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert step > 0
    assert all(math.isclose(right - left, step, rel_tol=1e-6) for left, right in itertools.pairwise(ticks))
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - round_one) for round_one in (1, 2, 5, 10)) < 1e-5


@given(numbers, numbers)
def test_no_tick_could_be_left_out_at_either_end(one: float, other: float):
    low, high = min(one, other), max(one, other)
    assume(high - low > 2e-6 * max(abs(low), abs(high), 1e-9))
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] > low - step * (1 + 1e-6) and ticks[-1] < high + step * (1 + 1e-6)


@given(st.floats(0, 1e6), st.floats(0.001, 1e6))
def test_ticks_read_differently_from_each_other(low: float, width: float):
    assume(width > low * 1e-4)
    texts = Axis.over("x", [low, low + width]).texts()
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("low", "high"), [(7.3999999999999995e-06, 7.65e-06), (0.00444, 0.004540000000000001)])
def test_an_end_a_rounding_error_beyond_a_tick_is_still_covered(low: float, high: float):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1]


def test_tick_labels_have_the_decimals_of_their_step():
    assert Axis("x", nice_ticks(0, 1)).texts() == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert Axis("x", nice_ticks(0, 30_000, 4)).texts() == ["0", "10,000", "20,000", "30,000"]
    assert tick_text(0.25, 0.05) == "0.25"


def test_ticks_are_the_decimal_numbers_people_write():
    assert nice_ticks(0, 0.6, 7) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@given(st.lists(st.floats(0, 300), max_size=8), st.floats(1, 30))
def test_labels_keep_their_distance_and_their_order(wanted: list[float], gap: float):
    places = spread(wanted, gap, 0, 300)
    in_order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert all(places[right] - places[left] >= gap - 1e-6 for left, right in itertools.pairwise(in_order))
    assert all(place >= -1e-6 for place in places)
    if gap * (len(wanted) - 1) <= 300:
        assert all(place <= 300 + 1e-6 for place in places)


def test_a_label_with_room_stays_where_it_was_wanted():
    assert spread([50.0, 10.0, 200.0], 16, 0, 300) == [50.0, 10.0, 200.0]


@given(st.text())
def test_any_text_stays_well_formed_xml(text: str):
    drawing = Drawing("name", text, text)
    drawing.add("text", text, x=1, y=2)
    root = ElementTree.fromstring(drawing.write().encode())
    assert [child.tag for child in root] == ["title", "desc", "text"]


def test_markup_in_a_label_is_text():
    svg = bars("name", "t", "s", [("<script>x</script>", 3.0, "3 & more")]).write()
    assert "<script>" not in svg
    assert "".join(ElementTree.fromstring(svg).itertext()).count("<script>x</script>") == 1


def test_a_point_lands_where_its_axes_say():
    plot = Plot("p", "t", "s", Axis("x", [0.0, 5.0, 10.0]), Axis("y", [0.0, 1.0, 2.0]))
    left, floor = plot.at((0, 0))
    right, top = plot.at((10, 2))
    assert plot.at((5, 1)) == pytest.approx(((left + right) / 2, (floor + top) / 2))
    assert left < right and top < floor  # down is positive in SVG


def test_a_long_legend_flows_into_rows_inside_the_drawing():
    entries = [(f"variant number {number} (int8, one scale a channel)", number) for number in range(8)]
    root = ElementTree.fromstring(Plot("p", "t", "s", Axis("x", [0.0, 1.0]), Axis("y", [0.0, 1.0]), entries).write())
    legend = [item for item in root.iter("text") if (item.text or "").startswith("variant")]
    assert len(legend) == 8
    assert all(float(item.get("x", "")) + 6 * len(item.text or "") < 560 for item in legend)


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(bars("b", "t", "s", [("one", 100.0, ""), ("two", 25.0, "")]).write())
    first, second = (float(item.get("width", "")) for item in root.iter("rect"))
    assert first / second == pytest.approx(4, rel=1e-3)


def test_a_curve_of_many_points_is_thinned_but_keeps_its_ends():
    points = [(float(number), 0.0) for number in range(10_001)]
    few = thinned(points, 100)
    assert len(few) == 100 and few[0] == points[0] and few[-1] == points[-1]
    assert thinned(points[:50], 100) == points[:50]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(0, 20))
def test_smoothing_agrees_with_the_mean_of_its_window(values: list[float], window: int):
    points = [(float(number), value) for number, value in enumerate(values)]
    for number, (across, mean) in enumerate(smoothed(points, window)):
        reach = min(window // 2, number, len(values) - 1 - number)
        around = values[number - reach : number + reach + 1]
        assert across == number and mean == pytest.approx(sum(around) / len(around), abs=1e-9)


def test_a_straight_line_is_not_bent_by_smoothing():
    line = [(float(number), 3.0 * number) for number in range(40)]
    assert [mean for _, mean in smoothed(line, 9)] == pytest.approx([value for _, value in line])


def test_the_staircase_rises_at_each_observation_to_a_hundred():
    assert steps([1.0, 2.0]) == [(0.0, 0.0), (1.0, 0.0), (1.0, 50.0), (2.0, 50.0), (2.0, 100.0)]


def test_a_shortened_text_says_that_it_was_cut():
    assert shortened("abcdef", 4) == "abc\u2026"
    assert shortened("abcd", 4) == "abcd"
