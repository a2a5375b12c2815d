"""Figures, contents and the wire, without a network."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.base.catalogue import CATALOGUE
from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError
from lineshaft.evaluate.load.arrivals import Arrival, Constant
from lineshaft.evaluate.load.client import Target, address
from lineshaft.evaluate.load.generate import Sent
from lineshaft.evaluate.load.measure import QUANTILES, Slo, measure, spread
from lineshaft.evaluate.load.record import Record
from lineshaft.evaluate.load.wire import Lines, body, event
from lineshaft.evaluate.load.workload import Ask, Asks, Workload

seconds = st.floats(0, 1e4)


@given(st.lists(seconds, min_size=1, max_size=200))
def test_quantiles_are_numpys(samples):
    found = spread("ttft", samples)
    for name, share in QUANTILES.items():
        assert found[f"ttft_{name}_seconds"] == np.quantile(samples, share)
    assert found["ttft_max_seconds"] == max(samples)
    assert found["ttft_mean_seconds"] == np.mean(samples)


def answered(number, scheduled, first, gaps, lag=0.0):
    at = scheduled + first + np.concatenate([[0], np.cumsum(gaps)])
    return Record(number, scheduled, sent=scheduled + lag, tokens_at=[float(moment) for moment in at], ended=float(at[-1]))


def test_every_figure_is_worked_out_by_hand():
    records = [answered(0, 0.0, 0.1, [0.1, 0.3]), answered(1, 1.0, 0.3, [0.1, 0.1], lag=0.02)]
    records += [Record(2, 2.0, sent=2.0, error="http 500", detail="no"), Record(3, 3.0, sent=3.0)]
    found = measure(Sent(records, [0.0, 0.001], 4.0), Slo(e2e=0.5), 0.0, 4.0)
    assert (found.offered, found.answered, found.good, found.failed, found.unfinished) == (4, 2, 2, 1, 1)
    assert found.metrics["ttft_p50_seconds"] == pytest.approx(0.2)
    assert found.metrics["itl_mean_seconds"] == pytest.approx(0.15)
    assert found.metrics["tpot_max_seconds"] == pytest.approx(0.2)
    assert found.metrics["latency_p50_seconds"] == pytest.approx(0.5)
    assert found.metrics["requests_per_second"] == pytest.approx(0.5)
    assert found.metrics["output_tokens_per_second"] == pytest.approx(1.5)
    assert found.metrics["goodput_share"] == pytest.approx(2 / 3)
    assert found.metrics["send_lag_max_seconds"] == pytest.approx(0.02)
    assert not found.keeps_up  # 20 ms late where the first token takes 200 ms
    assert found.metrics.keys() <= CATALOGUE.keys()


def test_nothing_answered_gives_no_latency_and_no_error():
    found = measure(Sent([Record(0, 0.0, sent=0.0, error="timeout")], [], 5.0), Slo(), 0.0, 1.0)
    assert (found.answered, found.errors, found.metrics["goodput_share"]) == (0, {"timeout": 1}, 0.0)
    assert "ttft_p50_seconds" not in found.metrics


def test_out_of_open_files_is_this_clients_fault():
    records = [answered(0, 0.0, 0.1, []), Record(1, 1.0, sent=1.0, error="client")]
    assert not measure(Sent(records, [], 2.0), Slo(), 0.0, 2.0).keeps_up


def test_the_mean_gap_counts_the_servers_tokens_and_not_the_pieces():
    """A server that sends two tokens a piece is twice as fast as its gaps."""
    record = answered(0, 0.0, 0.1, [0.2, 0.2])
    record.counted_tokens = 5
    assert record.per_token == pytest.approx(0.1)
    assert record.gaps == pytest.approx([0.2, 0.2])


# -- contents ---------------------------------------------------------------------------------------------------


def asks(seed=0, count=200, **settings):
    return Asks(load(Workload, settings), Constant(rate=1.0).arrivals(count, 0), seed)


@settings(max_examples=25)  # of 200 lengths each
@given(st.integers(0, 1 << 40))
def test_lengths_are_within_their_bounds_and_repeat_with_the_seed(seed):
    drawn = {
        "prompt_tokens": {"kind": "uniform", "lowest": 3, "highest": 9},
        "output_tokens": {"kind": "lognormal", "median": 20, "highest": 50},
    }
    first, second = asks(seed, **drawn), asks(seed, **drawn)
    assert all(3 <= len(first[n].prompt) <= 9 and 1 <= first[n].max_tokens <= 50 for n in range(200))
    assert first[7] == second[7] == first[7]
    assert all(100 <= token <= 249 for token in first[7].prompt)


def test_half_of_log_normal_lengths_are_below_the_median():
    found = asks(count=4000, prompt_tokens={"kind": "lognormal", "median": 50, "highest": 4000}, output_tokens=1)
    assert np.median([len(found[n].prompt) for n in range(4000)]) == pytest.approx(50, rel=0.1)


def test_that_share_of_prompts_begins_alike():
    found = asks(count=1000, prompt_tokens=12, shared_share=0.3, shared_tokens=8)
    starts = [tuple(found[n].prompt[:8]) for n in range(1000)]
    common = max(starts.count(start) for start in set(starts))
    assert common == pytest.approx(300, abs=70)


def test_a_traces_own_lengths_and_prompts_come_first():
    found = Asks(Workload(), [Arrival(0, 5, 2), Arrival(1, prompt="hello"), Arrival(2)], 0)
    assert (len(found[0].prompt), found[0].max_tokens) == (5, 2)
    assert found[1] == Ask("hello", 32)
    assert len(found[2].prompt) == 128


def test_words_come_from_the_file_in_their_order(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("a b c d")
    prompt = asks(prompts="text", prompt_tokens=6, text_file=str(path))[0].prompt.split()
    start = prompt.index("a")
    assert prompt[start : start + 3] == ["a", "b", "c", "d"][: len(prompt[start : start + 3])]
    for text, told in (("", "holds no words"), (None, "can't be read")):
        broken = tmp_path / "other.txt"
        if text is not None:
            broken.write_text(text)
        else:
            broken.unlink()
        with pytest.raises(ConfigError, match=told):
            _ = asks(prompts="text", text_file=str(broken))[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_tokens": 0},
        {"prompt_tokens": {"kind": "uniform", "lowest": 5, "highest": 4}},
        {"shared_share": 0.5},
        {"lowest_id": 300},
        {"prompt_token": 5},
    ],
)
def test_an_impossible_workload_is_refused(bad):
    with pytest.raises(ConfigError):
        load(Workload, bad)


# -- the wire ---------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), max_size=8), st.integers(1, 9))
def test_events_are_found_however_the_bytes_are_cut(texts, step):
    events = [msgspec.json.encode({"choices": [{"text": text}]}) for text in texts]
    stream = b"".join(b": note\r\n\r\ndata: " + payload + b"\n\n" for payload in events)
    lines, found = Lines(), []
    for begin in range(0, len(stream), step):
        found += lines.push(stream[begin : begin + step])
    assert found == events
    assert all(event(payload).has_text for payload in found)


@pytest.mark.parametrize(
    ("payload", "has_text", "finishes"),
    [
        (b'{"choices":[{"text":"a","logprobs":{"x":1}}]}', True, False),
        (b'{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}', False, False),
        (b'{"choices":[{"delta":{"reasoning_content":"hm"}}]}', True, False),
        (b'{"choices":[{"text":"","finish_reason":"stop"}]}', False, True),
        (b'{"choices":[],"usage":{"completion_tokens":3}}', False, False),
    ],
)
def test_an_event_says_what_it_carries(payload, has_text, finishes):
    assert (event(payload).has_text, event(payload).finishes) == (has_text, finishes)


@pytest.mark.parametrize("payload", [b"{", b"[]", b"\xff", b'{"choices": 3}'])
def test_what_is_no_event_is_a_value_error(payload):
    with pytest.raises(ValueError):
        event(payload)


def test_a_chat_request_holds_a_message_and_a_completion_a_prompt():
    chat = msgspec.json.decode(body("chat", "m", Ask("hi", 3), ignore_eos=False, temperature=0.0))
    plain = msgspec.json.decode(body("completions", "m", Ask([1, 2], 3), ignore_eos=True, temperature=0.5))
    assert chat["messages"] == [{"role": "user", "content": "hi"}]
    assert "ignore_eos" not in chat and "prompt" not in chat
    assert (plain["prompt"], plain["ignore_eos"], plain["stream"], plain["temperature"]) == ([1, 2], True, True, 0.5)


def test_a_servers_url_is_told_apart_from_what_is_none():
    assert address("http://h:1/v1/") == address("http://h:1") == "http://h:1"
    assert address("https://h/base") == "https://h/base"
    for bad in ("localhost:8000", "ftp://h", "http://", "http://h:x", "http://h?a=1", "http://[::1"):
        with pytest.raises(ConfigError, match="write a server as http://host:port"):
            address(bad)
    with pytest.raises(ConfigError, match="no name or password"):
        address("http://me:secret@h")


def test_a_key_is_taken_out_of_what_a_server_says():
    target = Target("http://h", "m", "chat", "abc-key")
    assert target.clean("bad\nkey abc-key") == "bad key (key)"
    assert target.clean("\x1b[2Jgone") == "[2Jgone"
    assert "abc-key" not in repr(target)
