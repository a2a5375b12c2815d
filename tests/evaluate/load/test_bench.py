"""The load generator over HTTP against a server with known delays."""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import nullcontext

import numpy as np
import pytest
from aiohttp import web
from fake_openai import FakeOpenAI, served
from load_world import Silent, measured
from virtual_loop import VirtualLoop

from lineshaft.base.config import load
from lineshaft.base.errors import Capacity, ConfigError, EngineError, LineshaftError, RequestError, UnknownModel
from lineshaft.evaluate.load.bench import FEWEST, LoadConfig, bench
from lineshaft.evaluate.load.generate import BEAT_SECONDS, offer

ONE = {"prompt_tokens": 4, "output_tokens": 1}


def delays(number: int) -> float:
    """A known distribution: 0.1 to 0.3 s, the golden ratio's multiples spread evenly over it."""
    return 0.1 + 0.2 * (number * 0.6180339887498949 % 1)


def test_quantiles_of_known_delays_are_right_to_two_percent():
    run = measured(
        FakeOpenAI(delays, 0.02), seconds=30, workload={"prompt_tokens": 4, "output_tokens": 6}, arrivals={"kind": "poisson", "rate": 10.0}
    ).shown
    found, first = run.measured.metrics, [delays(number) for number in range(len(run.records))]
    assert len(run.records) > 250
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[f"ttft_{name}_seconds"] == pytest.approx(np.quantile(first, share), rel=0.02)
        assert found[f"latency_{name}_seconds"] == pytest.approx(np.quantile(first, share) + 5 * 0.02, rel=0.02)
        assert found[f"itl_{name}_seconds"] == pytest.approx(0.02, rel=0.02)
        assert found[f"tpot_{name}_seconds"] == pytest.approx(0.02, rel=0.02)


@pytest.mark.slow  # its two percent need a machine that does nothing else
def test_quantiles_are_right_by_real_time_too():
    fake = FakeOpenAI(lambda _: 0.4)
    with served(fake) as url:
        config = load(LoadConfig, {"url": url, "seconds": 2, "arrivals": {"kind": "constant", "rate": 10}, "workload": ONE})
        found = bench(config, lambda *_: nullcontext(Silent())).shown.measured.metrics
    truth = fake.took[1:]  # as the server saw it: its own timers are late on a busy machine
    assert found["ttft_p50_seconds"] == pytest.approx(np.quantile(truth, 0.5), rel=0.02)


def test_rates_and_tokens_are_counted():
    run = measured(FakeOpenAI(), seconds=10, arrivals={"kind": "constant", "rate": 5.0}, workload={"prompt_tokens": 7, "output_tokens": 3})
    seen = run.shown.measured
    assert (seen.offered, seen.answered, seen.failed) == (50, 50, 0)
    assert (seen.prompt_tokens, seen.output_tokens, seen.counted_by) == (350, 150, "server")
    assert seen.metrics["offered_requests_per_second"] == pytest.approx(5)
    assert seen.metrics["requests_per_second"] == pytest.approx(5, rel=0.01)
    assert seen.metrics["output_tokens_per_second"] == pytest.approx(15, rel=0.01)


# -- coordinated omission ---------------------------------------------------------------------------------------


STALL = {"stall_at": 10.0, "stall": 0.5}


def test_a_planted_stall_shows_in_p99_of_an_open_loop_and_hides_in_a_closed_one():
    opened = measured(FakeOpenAI(lambda _: 0.02, **STALL), seconds=20, arrivals={"kind": "constant", "rate": 20.0}, workload=ONE).shown
    metrics = opened.measured.metrics
    assert opened.measured.answered == 400
    assert metrics["latency_p50_seconds"] == pytest.approx(0.02, rel=0.02)
    # it stalls 0.5 s: ten requests were due meanwhile, the first waits longest, so P99 of 400 is the fourth longest
    assert metrics["latency_max_seconds"] == pytest.approx(0.52, abs=0.05)
    assert metrics["latency_p99_seconds"] > 0.3
    assert sum(record.latency > 0.03 for record in opened.records) == pytest.approx(10, abs=1)
    closed = closed_loop(step=0.02, seconds=20, pause=1 / 20 - 0.02)
    assert len(closed) > 380
    assert np.quantile(closed, 0.99) == pytest.approx(0.02)


def closed_loop(step: float, seconds: float, pause: float) -> list[float]:
    """Latencies as a client sees them that sends the next request after the answer; the same server, worked out by hand."""
    now, seen = 0.0, []
    while now < seconds:
        begin, end = STALL["stall_at"], STALL["stall_at"] + STALL["stall"]
        done = now + step if not begin <= now + step < end else end
        seen.append(done - now)
        now = done + pause
    return seen


def test_latency_counts_from_when_a_request_was_due_although_the_server_is_overloaded():
    """Deterministic queue: at 20/s into 10/s the n-th request waits n * (1/10 - 1/20) seconds."""
    run = measured(FakeOpenAI(lambda _: 0.1, workers=1), seconds=4, arrivals={"kind": "constant", "rate": 20.0}, workload=ONE).shown
    for number, record in enumerate(run.records):
        assert record.latency == pytest.approx(0.1 + number * 0.05, rel=0.02, abs=0.005)
        assert record.lag < 0.001


# -- goodput and the highest rate -------------------------------------------------------------------------------


def test_goodput_counts_what_keeps_every_limit():
    fake = FakeOpenAI(lambda number: 0.1 if number % 4 else 0.5, 0.02)
    slo = {"ttft": 0.2, "itl": 0.03, "e2e": 1.0}
    seen = measured(
        fake, seconds=10, arrivals={"kind": "constant", "rate": 10.0}, workload={"prompt_tokens": 4, "output_tokens": 5}, slo=slo
    )
    assert seen.shown.measured.metrics["goodput_share"] == pytest.approx(0.75)


def test_the_highest_rate_of_a_live_server_is_found_within_three_percent():
    """One worker, 50 ms each: from 20 requests a second on the queue grows without end."""
    settings = {"seconds": 6, "timeout": 1.0, "workload": ONE, "slo": {"e2e": 0.1, "share": 0.9}, "search": {}}
    outcome = measured(FakeOpenAI(lambda _: 0.05, workers=1), arrivals={"kind": "constant", "rate": 16.0}, **settings)
    assert outcome.found.limit == "slo"
    assert outcome.found.rate == pytest.approx(20, rel=0.03)
    assert outcome.shown.rate == outcome.found.rate
    assert outcome.conclusive
    assert {record.probe for run in outcome.runs for record in run.records} == set(range(len(outcome.runs)))


def test_a_search_that_no_rate_can_end_well_ends_before_nothing_is_sent():
    settings = {"seconds": 4, "workload": ONE, "slo": {"ttft": 0.1}, "search": {}}
    outcome = measured(FakeOpenAI(lambda _: 0.5), arrivals={"kind": "poisson", "rate": 18.0}, **settings)
    assert (outcome.found.limit, outcome.found.rate, outcome.conclusive) == ("lowest", None, False)
    assert outcome.found.failing == FEWEST / 4
    assert all(probe.requests for probe in outcome.found.probes)


# -- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"errors_from": 5, "status": 429}, "http 429"),
        ({"errors_from": 5, "status": 503}, "http 503"),
        ({"errors_from": 5, "status": 307}, "http 307"),
        ({"breaks_from": 5}, "in the stream"),
        ({"cut_from": 5}, "cut off"),
        ({"hangs_up_from": 5}, "connection"),
    ],
)
def test_failures_are_counted_by_kind_and_miss_the_slo(fault, kind):
    seen = measured(
        FakeOpenAI(**fault), seconds=2, arrivals={"kind": "constant", "rate": 5.0}, workload=ONE, slo={"e2e": 9.0}
    ).shown.measured
    assert seen.errors == {kind: 5}
    assert seen.example[kind]
    assert (seen.answered, seen.good) == (5, 5)
    assert seen.metrics["goodput_share"] == 0.5


def test_a_request_times_out_from_when_it_was_due():
    run = measured(
        FakeOpenAI(lambda n: 60 if n == 3 else 0.1), seconds=2, timeout=2.0, arrivals={"kind": "constant", "rate": 5.0}, workload=ONE
    )
    assert run.shown.measured.errors == {"timeout": 1}
    assert run.shown.records[3].error == "timeout"


def test_the_time_that_this_client_was_late_counts_towards_the_timeout():
    loop = VirtualLoop()

    async def send(record, start):
        record.sent = loop.time() - start
        if record.number == 0:
            loop.jumping.now += 1.5  # the next one, due at 0.1, is sent at 1.5
        else:
            await asyncio.sleep(1.0)

    sent = loop.run_until_complete(offer([0.0, 0.1], lambda _: send, 2.0, lambda _: None))
    loop.finish()
    assert sent.records[1].lag == pytest.approx(1.4, abs=0.05)
    assert sent.records[1].error == "timeout"


def test_tokens_are_counted_by_their_pieces_where_the_server_does_not_count():
    seen = measured(
        FakeOpenAI(usage=False), seconds=2, arrivals={"kind": "poisson", "rate": 5.0}, workload={"prompt_tokens": 4, "output_tokens": 3}
    ).shown.measured
    assert (seen.output_tokens, seen.counted_by) == (3 * seen.answered, "pieces")


@pytest.mark.parametrize(
    ("fake", "settings", "error", "told"),
    [
        (FakeOpenAI(look_status=401), {}, ConfigError, "OPENAI_API_KEY, which is not set"),
        (FakeOpenAI(models_status=401), {}, ConfigError, "OPENAI_API_KEY"),
        (FakeOpenAI(look_status=400), {}, RequestError, "workload.prompts=text"),
        (FakeOpenAI(look_status=429), {}, Capacity, "cannot"),
        (FakeOpenAI(look_status=500), {}, EngineError, "http 500: cannot"),
        (FakeOpenAI(models=("a", "b")), {}, ConfigError, "serves a, b: choose one with --model"),
        (FakeOpenAI(models=("a", "b")), {"model": "c"}, UnknownModel, 'does not serve "c"; it has a, b'),
    ],
)
def test_what_every_request_would_be_refused_for_is_told_before_the_load(fake, settings, error, told, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(error) as caught:
        measured(fake, **settings)
    assert told in str(caught.value)
    assert len(fake.bodies) <= 1


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-mine")
    fake = FakeOpenAI()
    outcome = measured(fake, seconds=1, arrivals={"kind": "poisson", "rate": 5.0}, workload=ONE)
    assert fake.headers[0]["Authorization"] == "Bearer secret-of-mine"
    assert "secret-of-mine" not in repr(outcome)
    with pytest.raises(LineshaftError) as caught:
        measured(FakeOpenAI(models_status=403))
    assert "secret-of-mine" not in str(caught.value)


def test_white_space_around_a_key_is_left_out_and_what_is_no_key_is_refused_unshown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " secret\n")
    fake = FakeOpenAI()
    measured(fake, seconds=1, arrivals={"kind": "constant", "rate": 2.0}, workload=ONE)
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds characters") as caught:
        measured(FakeOpenAI())
    assert "ret" not in str(caught.value)


def test_a_whole_answer_counts_although_the_connection_breaks_behind_it():
    class Torn(FakeOpenAI):
        async def stream(self, request, response, body, number):
            await super().stream(request, response, body, number)
            await asyncio.sleep(0.01)
            request.transport.close()

    seen = measured(Torn(), seconds=2, arrivals={"kind": "constant", "rate": 5.0}, workload=ONE).shown.measured
    assert (seen.answered, seen.errors) == (10, {})


def test_a_list_of_models_may_come_in_pieces_and_a_long_one_is_told_short():
    class Slow(FakeOpenAI):
        async def listed(self, request):
            response = web.StreamResponse(headers={"content-type": "application/json"})
            await response.prepare(request)
            text = json.dumps({"data": [{"id": f"model-{number}"} for number in range(500)]}).encode()
            for begin in range(0, len(text), 4096):
                await response.write(text[begin : begin + 4096])
                await asyncio.sleep(0.01)
            return response

    with pytest.raises(ConfigError, match="model-9 and 490 more: choose one with --model"):
        measured(Slow())


# -- contents ---------------------------------------------------------------------------------------------------


def test_a_trace_is_played_to_its_end_unless_a_length_is_given(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f'{{"at": {2 * number}}}\n' for number in range(20)))  # 40 s
    trace = {"arrivals": {"kind": "trace", "path": str(path)}, "workload": ONE}
    seen = measured(FakeOpenAI(), **trace).shown.measured
    assert (seen.offered, seen.metrics["offered_requests_per_second"]) == (20, pytest.approx(0.5))
    assert measured(FakeOpenAI(), seconds=10, **trace).shown.measured.offered == 5
    with pytest.raises(ConfigError, match="leaves nothing to measure"):
        measured(FakeOpenAI(), warmup=40, **trace)
    path.write_text('{"at": 0}\n{"at": 90000}\n')
    with pytest.raises(ConfigError, match="more than a day"):
        measured(FakeOpenAI(), **trace)


def test_warm_up_is_sent_and_not_counted():
    fake = FakeOpenAI(lambda number: 1.0 if number < 10 else 0.1)
    seen = measured(fake, seconds=4, warmup=2.0, arrivals={"kind": "constant", "rate": 5.0}, workload=ONE).shown.measured
    assert (seen.warmup, seen.offered) == (10, 20)
    assert seen.metrics["ttft_max_seconds"] == pytest.approx(0.1, rel=0.02)


def test_the_chat_api_is_spoken_with_text():
    fake = FakeOpenAI(gap=0.01)
    outcome = measured(
        fake,
        api="chat",
        seconds=2,
        arrivals={"kind": "poisson", "rate": 5.0},
        workload={"prompts": "text", "prompt_tokens": 6, "output_tokens": 3},
    )
    assert outcome.shown.measured.output_tokens == 3 * outcome.shown.measured.answered
    assert len(fake.bodies[1]["messages"][0]["content"].split()) == 6
    assert outcome.shown.measured.metrics["tpot_p50_seconds"] == pytest.approx(0.01, rel=0.02)


def test_what_is_sent_is_what_was_configured():
    fake = FakeOpenAI()
    shared = {"shared_share": 1.0, "shared_tokens": 5}
    measured(
        fake,
        seconds=2,
        arrivals={"kind": "poisson", "rate": 5.0},
        workload={"prompt_tokens": 8, "output_tokens": 2, "ignore_eos": False, **shared},
    )
    bodies = fake.bodies[1:]
    assert all(len(body["prompt"]) == 8 and body["max_tokens"] == 2 and "ignore_eos" not in body for body in bodies)
    assert len({tuple(body["prompt"][:5]) for body in bodies}) == 1
    assert len({tuple(body["prompt"]) for body in bodies}) == len(bodies)
    assert fake.bodies[0]["prompt"][:5] != bodies[0]["prompt"][:5]


# -- this client ------------------------------------------------------------------------------------------------


def test_a_client_that_is_late_refuses_to_call_its_figures_a_result(monkeypatch):
    """Somebody else blocks the client's processor: for three quarters of a second of every second."""

    class Hog(FakeOpenAI):
        async def answer(self, request):
            loop = asyncio.get_running_loop()
            if len(self.bodies) % 10 == 5:
                loop.jumping.now += 0.75  # time goes by and nobody could run
            return await super().answer(request)

    outcome = measured(Hog(lambda _: 0.05), seconds=10, arrivals={"kind": "constant", "rate": 10.0}, workload=ONE)
    assert not outcome.shown.measured.keeps_up
    assert not outcome.conclusive
    assert outcome.shown.measured.metrics["send_lag_max_seconds"] > 0.5


def test_a_halt_of_this_client_is_as_many_late_beats_as_were_due_meanwhile():
    """Else its own lateness would leave out what coordinated omission leaves out."""
    loop = VirtualLoop()

    async def send(record, start):
        record.sent = record.ended = record.scheduled
        if record.number == 1:
            loop.jumping.now += 1.0

    sent = loop.run_until_complete(offer([0.0, 1.0, 4.0], lambda _: send, 60.0, lambda _: None))
    loop.finish()
    late = [seconds for seconds in sent.lateness if seconds > 0.001]
    assert len(late) == pytest.approx(1 / BEAT_SECONDS, abs=1)
    assert np.mean(late) == pytest.approx(0.5, abs=0.05)


def test_a_cancelled_run_returns_what_was_measured_until_then():
    """What Ctrl-C does to the main task."""

    async def main():
        async def send(record, start):
            record.sent = record.scheduled
            if record.number > 2:
                await asyncio.sleep(100)
            record.ended = record.scheduled + 0.1

        run = asyncio.create_task(offer([0.0, 0.01, 0.02, 0.03, 50.0], lambda _: send, 60.0, ended.append))
        while len(ended) < 3:
            await asyncio.sleep(0.005)
        run.cancel()
        return await run

    ended: list = []
    sent = asyncio.run(main())
    assert sent.interrupted
    assert [record.answered for record in sent.records[:3]] == [True] * 3
    assert all(record.ended is None and record.error is None for record in sent.records[3:])


def test_a_defect_of_ours_is_not_hushed():
    async def send(record, start):
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        asyncio.run(offer([0.0], lambda _: send, 1.0, lambda _: None))


def test_too_many_requests_are_refused_before_anything_is_sent():
    with pytest.raises(ConfigError, match="exceed max_requests"):
        measured(fake := FakeOpenAI(), seconds=1000, arrivals={"kind": "poisson", "rate": 100.0})
    assert list(itertools.chain(fake.bodies)) == []
