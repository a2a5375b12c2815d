"""A report: what was found out about one checkpoint.

Payload: `report.json` (what does not depend on machine or moment; part of the artifact's digest) and `measured.json`
(times, speeds, memory; checked on load, not part of the digest). Every metric is in the catalogue.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from lineshaft.base.catalogue import metric
from lineshaft.base.config import Config, load
from lineshaft.base.errors import StoreError
from lineshaft.base.store import Artifact, Draft

REPORT_FILE = "report.json"
GREEDY_FILE = "greedy.u32"
"""The most likely token at each predicted place of the held-out text, little-endian uint32; documents one after another."""
MEASURED_FILE = "measured.json"


class Report(Config):
    """Deterministic findings."""

    subject: str
    """Artifact id of the checkpoint."""
    format: str
    """How its weights are stored, in words, such as `int8, one scale a channel`."""
    metrics: dict[str, float]
    """Catalogue name to value."""
    notes: list[str] = []
    """Sentences that a reader needs to read the numbers right."""
    documents: list[list[float]] = []
    """Of each held-out document: its number, nats, predicted tokens, and how many of these were the most likely one."""


class Measured(Config):
    """Findings that hold for this machine and this moment."""

    metrics: dict[str, float]
    samples: dict[str, list[float]] = {}
    """Single observations behind the metrics, such as the latency of each request in seconds."""
    machine: dict[str, Any] = {}


def write_report(draft: Draft, report: Report, measured: Measured, greedy: npt.NDArray[np.int64] | None = None) -> None:
    """Write the files into the draft; `greedy`: the most likely tokens, for GREEDY_FILE.

    A name that is not in the catalogue, or on the wrong side, is a KeyError; a value that is not finite is a StoreError,
    since neither JSON nor a comparison can hold it.
    """
    _check(report.metrics, measured=False)
    _check(measured.metrics, measured=True)
    for name, half in ((REPORT_FILE, report), (MEASURED_FILE, measured)):
        text = json.dumps(half.model_dump(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (draft.root / name).write_text(text, encoding="utf-8")
    draft.aside_files.add(MEASURED_FILE)
    if greedy is not None:
        (draft.root / GREEDY_FILE).write_bytes(greedy.astype("<u4").tobytes())


def read_report(artifact: Artifact) -> tuple[Report, Measured]:
    """Both halves of a report artifact."""
    report = load(Report, json.loads(artifact.path(REPORT_FILE).read_bytes()), where=REPORT_FILE)
    return report, load(Measured, json.loads(artifact.path(MEASURED_FILE).read_bytes()), where=MEASURED_FILE)


def read_greedy(artifact: Artifact) -> npt.NDArray[np.int64] | None:
    """The most likely tokens; None where the report has none."""
    path = artifact.path(GREEDY_FILE)
    return np.frombuffer(path.read_bytes(), "<u4").astype(np.int64) if path.is_file() else None


def _check(metrics: dict[str, float], *, measured: bool) -> None:
    for name, value in metrics.items():
        if metric(name).measured != measured:
            raise KeyError(f"{name} belongs into {MEASURED_FILE if metric(name).measured else REPORT_FILE}")
        if not math.isfinite(value):
            raise StoreError(f"{name} is {value}: a report holds finite numbers; look at what was measured")
