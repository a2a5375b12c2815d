"""The server's metrics: the instruments that the catalogue lists, and no others."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client as prometheus
from prometheus_client.metrics import MetricWrapperBase

from lineshaft.base.catalogue import CATALOGUE, Metric, metric

MODEL = "model_name"
CONTENT_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """One server's instruments. Their label `model_name` is always the served model; others are given with each value."""

    def __init__(self, model: str) -> None:
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # its `_created` series are names that the catalogue does not list
        self._model = model
        self._registry = prometheus.CollectorRegistry()
        self._instruments = {name: self._build(entry) for name, entry in CATALOGUE.items() if entry.instrument != "value"}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        counter = self._of(name, labels)
        assert isinstance(counter, prometheus.Counter)
        counter.inc(amount)

    def observe(self, name: str, value: float) -> None:
        """Enter one observation, in the unit of the histogram."""
        histogram = self._of(name, {})
        assert isinstance(histogram, prometheus.Histogram)
        histogram.observe(value)

    def follow(self, name: str, read: Callable[[], float], **labels: str) -> None:
        """Let a gauge show what `read` returns whenever it is scraped."""
        gauge = self._of(name, labels)
        assert isinstance(gauge, prometheus.Gauge)
        gauge.set_function(read)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        gauge = self._of(name, {})
        assert isinstance(gauge, prometheus.Gauge)
        gauge.set(value)

    def exposition(self) -> bytes:
        """All of them as Prometheus reads them."""
        return prometheus.generate_latest(self._registry)

    def _build(self, entry: Metric) -> MetricWrapperBase:
        if entry.instrument == "histogram":
            return self._bound(
                entry, prometheus.Histogram(entry.name, entry.help, entry.labels, buckets=entry.buckets, registry=self._registry)
            )
        kind = prometheus.Counter if entry.instrument == "counter" else prometheus.Gauge
        return self._bound(entry, kind(entry.name, entry.help, entry.labels, registry=self._registry))

    def _bound(self, entry: Metric, instrument: MetricWrapperBase) -> MetricWrapperBase:
        """With its label filled in where it is the model alone: looked up once, and shown as 0 from the start."""
        return instrument.labels(self._model) if entry.labels == (MODEL,) else instrument

    def _of(self, name: str, labels: dict[str, str]) -> MetricWrapperBase:
        if not labels:
            return self._instruments[name]
        own = {MODEL: self._model} if MODEL in metric(name).labels else {}
        return self._instruments[name].labels(**own, **labels)
