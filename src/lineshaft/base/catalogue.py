"""The metric catalogue: every number that lineshaft reports or exposes, defined once.

Reports, the terminal table, the HTML page, `/metrics`, and later alerts and dashboards take names, units and meaning
from here; a test refuses a metric that is not listed. Server metrics carry vLLM's names where the meaning is the same,
so that existing dashboards keep working (docs/adr/0003). Units are in the name: seconds, bytes, tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Instrument = Literal["value", "counter", "gauge", "histogram"]
Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Metric:
    """One number: its name, what it means, its unit, and which way is better."""

    name: str
    help: str
    unit: str
    better: Better = "neither"
    instrument: Instrument = "value"
    """`value` stands in a report; the others are Prometheus instruments of the server."""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    measured: bool = False
    """True where the value depends on machine and moment, so it never enters a digest."""


_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)

_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0)

_REPORT = (
    Metric("loss_nats_per_token", "Mean cross-entropy of held-out tokens", "nats/token", "lower"),
    Metric("bits_per_byte", "Held-out cross-entropy over UTF-8 bytes of the text: comparable between tokenizers", "bits/byte", "lower"),
    Metric("perplexity", "exp(loss_nats_per_token)", "", "lower"),
    Metric("next_token_accuracy", "Share of held-out tokens that were the most likely one", "", "higher"),
    Metric("heldout_tokens", "Held-out tokens that were predicted", "tokens"),
    Metric("bigram_loss_nats_per_token", "The same loss for interpolated bigram counts of the training tokens", "nats/token", "lower"),
    Metric("bigram_bits_per_byte", "The same bits per byte for the bigram baseline", "bits/byte", "lower"),
    Metric("bits_per_byte_below_bigram", "1 - bits_per_byte / bigram_bits_per_byte", "", "higher"),
    Metric("parameters", "Weights of the model, embeddings included", "weights"),
    Metric("active_parameters", "Weights that one token uses", "weights"),
    Metric("weights_bytes", "Size of the checkpoint's tensors on disk", "bytes", "lower"),
    Metric("bits_per_weight", "8 * weights_bytes / parameters", "bits", "lower"),
    Metric(
        "quantised_share_of_fp32", "Bytes of the quantised tensors and their scales over the bytes of the same tensors in FP32", "", "lower"
    ),
    Metric("kv_bytes_per_token", "Cache bytes that one token of context takes", "bytes", "lower"),
    Metric(
        "peak_memory_bytes", "Highest resident memory of a fresh process that loads the model and answers", "bytes", "lower", measured=True
    ),
    Metric("load_seconds", "Reading and building the model in a process that already runs", "s", "lower", measured=True),
    Metric("prefill_tokens_per_second", "Prompt tokens read in one pass over its time", "tokens/s", "higher", measured=True),
    Metric(
        "decode_tokens_per_second",
        "Tokens produced by a single stream over its time after the first token",
        "tokens/s",
        "higher",
        measured=True,
    ),
    Metric(
        "batch_decode_tokens_per_second",
        "Output tokens of several requests at once over the whole time",
        "tokens/s",
        "higher",
        measured=True,
    ),
    Metric("latency_p50_seconds", "Median time of a whole request", "s", "lower", measured=True),
    Metric("latency_p90_seconds", "Time that 90 % of the requests stayed under", "s", "lower", measured=True),
    Metric("latency_p99_seconds", "Time that 99 % of the requests stayed under", "s", "lower", measured=True),
    Metric(
        "usd_per_million_tokens",
        "Price of the machine an hour over output tokens an hour at full batch, per million",
        "USD",
        "lower",
        measured=True,
    ),
)

_SERVER = (
    Metric("vllm:num_requests_running", "Requests being worked on", "requests", instrument="gauge", labels=("model_name",)),
    Metric("vllm:num_requests_waiting", "Requests that wait for room", "requests", "lower", "gauge", ("model_name",)),
    Metric("vllm:kv_cache_usage_perc", "Share of cache pages in use, 0 to 1", "", instrument="gauge", labels=("model_name",)),
    Metric("vllm:prompt_tokens", "Prompt tokens read", "tokens", instrument="counter", labels=("model_name",)),
    Metric("vllm:generation_tokens", "Tokens produced", "tokens", instrument="counter", labels=("model_name",)),
    Metric("vllm:request_success", "Requests ended, by reason", "requests", instrument="counter", labels=("model_name", "finished_reason")),
    Metric("vllm:time_to_first_token_seconds", "From arrival to the first token", "s", "lower", "histogram", ("model_name",), _LATENCY),
    Metric("vllm:inter_token_latency_seconds", "From one token to the next", "s", "lower", "histogram", ("model_name",), _LATENCY),
    Metric("vllm:e2e_request_latency_seconds", "From arrival to the last token", "s", "lower", "histogram", ("model_name",), _LATENCY),
    Metric(
        "vllm:request_queue_time_seconds",
        "From arrival to the first step that works on it",
        "s",
        "lower",
        "histogram",
        ("model_name",),
        _LATENCY,
    ),
    Metric(
        "vllm:request_prefill_time_seconds", "From the first step to the first token", "s", "lower", "histogram", ("model_name",), _LATENCY
    ),
    Metric("vllm:request_decode_time_seconds", "From the first token to the last", "s", "lower", "histogram", ("model_name",), _LATENCY),
    Metric("vllm:request_prompt_tokens", "Tokens of a prompt", "tokens", "neither", "histogram", ("model_name",), _COUNTS),
    Metric("vllm:request_generation_tokens", "Tokens of an answer", "tokens", "neither", "histogram", ("model_name",), _COUNTS),
    Metric("vllm:iteration_tokens_total", "Tokens run in a step", "tokens", "neither", "histogram", ("model_name",), _COUNTS),
    Metric("vllm:num_preemptions", "Requests that had to give up their pages", "requests", "lower", "counter", ("model_name",)),
    Metric("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", "tokens", "neither", "counter", ("model_name",)),
    Metric("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", "tokens", "higher", "counter", ("model_name",)),
    Metric("lineshaft:batch_size", "Requests in a step", "requests", "neither", "histogram", ("model_name",), _COUNTS),
    Metric("lineshaft:admission_limit", "Requests that may be worked on at once now", "requests", "neither", "gauge", ("model_name",)),
    Metric("lineshaft:engine_busy_seconds", "Time in steps; its rate is the busy share", "s", "neither", "counter", ("model_name",)),
    Metric("lineshaft:engine_restarts", "Engines started after the first", "engines", "lower", "counter", ("model_name",)),
    Metric("lineshaft:model_weight_bytes", "Memory that the weights take", "bytes", "lower", "gauge", ("model_name",)),
    Metric("lineshaft:bits_per_weight", "Bits of memory a parameter, scales included", "bits", "lower", "gauge", ("model_name",)),
    Metric(
        "lineshaft:kv_cache_bytes_per_token", "Cache that a token takes; / 1e9 for GB a token", "bytes", "lower", "gauge", ("model_name",)
    ),
    Metric("lineshaft:resident_memory_bytes", "Resident memory of a process: front or engine", "bytes", "lower", "gauge", ("process",)),
    Metric("lineshaft:http_errors", "Answers with an error status, by status", "responses", "lower", "counter", ("status",)),
)

_TIMES = {
    "ttft": "Time from when a request was due to its first token",
    "itl": "Time from one piece of text to the next, of all requests",
    "tpot": "Time a token after the first, a request's mean",
    "latency": "Time from when a request was due to the end of its answer",
}
_ENDS = {"mean": "mean", "p50": "median", "p90": "90 % stayed under it", "p99": "99 % stayed under it", "max": "longest"}

_LOAD = (
    *(
        Metric(f"{family}_{end}_seconds", f"{meaning}: {words}", "s", "lower", measured=True)
        for family, meaning in _TIMES.items()
        for end, words in _ENDS.items()
        if (family, end) not in {("latency", "p50"), ("latency", "p90"), ("latency", "p99")}  # a report has them
    ),
    Metric("offered_requests_per_second", "Requests that were due over the time in which they were", "requests/s", measured=True),
    Metric("requests_per_second", "Requests answered over the whole time", "requests/s", "higher", measured=True),
    Metric("output_tokens_per_second", "Tokens of the answered requests over the whole time", "tokens/s", "higher", measured=True),
    Metric("goodput_share", "Share of requests answered within every limit of the SLO", "", "higher", measured=True),
    Metric("goodput_requests_per_second", "Such requests over the whole time", "requests/s", "higher", measured=True),
    Metric("send_lag_p99_seconds", "How late the load generator sent: 99 % stayed under it", "s", "lower", measured=True),
    Metric("send_lag_max_seconds", "How late the load generator sent: longest", "s", "lower", measured=True),
    Metric("client_lateness_p99_seconds", "How late the load generator woke up: 99 % stayed under it", "s", "lower", measured=True),
    Metric("client_lateness_max_seconds", "How late the load generator woke up: longest", "s", "lower", measured=True),
    Metric("max_rate_requests_per_second", "Highest rate at which the SLO was met", "requests/s", "higher", measured=True),
)

CATALOGUE: Mapping[str, Metric] = {metric.name: metric for metric in (*_REPORT, *_SERVER, *_LOAD)}


def metric(name: str) -> Metric:
    """The catalogue's entry. A name that is not listed is a mistake in our code, so this is a KeyError."""
    return CATALOGUE[name]
