"""Stop strings do not depend on how the text was cut into tokens."""

from hypothesis import given
from hypothesis import strategies as st

from lineshaft.serve.stops import StopScanner

LETTERS = st.text(alphabet="abc", max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def scanned(pieces, stops):
    scanner, shown = StopScanner(stops), ""
    for piece in pieces:
        shown += scanner.push(piece)
        if scanner.found:
            return shown, True
    return shown + scanner.finish(), False


def by_hand(text, stops):
    """The text before the stop string that is complete first, found one character at a time."""
    for end in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(st.lists(LETTERS, max_size=8), STOPS)
def test_the_answer_is_the_text_before_the_first_complete_stop_string(pieces, stops):
    assert scanned(pieces, stops) == by_hand("".join(pieces), stops)


@given(st.lists(LETTERS, max_size=8), STOPS)
def test_nothing_is_shown_that_a_later_stop_string_takes_back_and_no_more_is_held_than_needed(pieces, stops):
    scanner, text, shown = StopScanner(stops), "", ""
    for piece in pieces:
        text += piece
        shown += scanner.push(piece)
        if scanner.found:
            return
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
