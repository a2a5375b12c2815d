"""The two tables that everything else names things from."""

from __future__ import annotations

import inspect
import re

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lineshaft.base import catalogue, errors


def test_no_metric_stands_twice_and_each_has_a_meaning() -> None:
    listed = [*catalogue._REPORT, *catalogue._SERVER, *catalogue._LOAD]
    assert len(catalogue.CATALOGUE) == len(listed)
    assert all(item.help and not item.help.endswith(".") for item in listed)
    with pytest.raises(KeyError):
        catalogue.metric("loss")


def test_prometheus_takes_every_metric_of_the_server() -> None:
    registry = CollectorRegistry()
    for item in catalogue._SERVER:
        if item.instrument == "histogram":
            assert sorted(set(item.buckets)) == list(item.buckets) != []
            Histogram(item.name, item.help, item.labels, registry=registry, buckets=item.buckets)
        else:
            {"counter": Counter, "gauge": Gauge}[item.instrument](item.name, item.help, item.labels, registry=registry)


def test_only_times_and_speeds_are_measured() -> None:
    for item in catalogue._REPORT:
        assert item.measured == (item.unit in ("s", "tokens/s", "USD") or item.name == "peak_memory_bytes"), item.name


def test_what_a_load_generator_sees_is_always_measured() -> None:
    assert all(item.measured and item.instrument == "value" for item in catalogue._LOAD)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn: list[tuple[str, str, int]] = []
    parents: list[tuple[str, int]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    (\|   )*(\+-- )?([A-Z]\w+)\b(?:.*exit (\d+)$)?", line):
            depth = (found.start(3) - 4) // 4
            parents = parents[:depth]
            code = int(found[4]) if found[4] else (parents[-1][1] if parents else 1)
            drawn.append((found[3], parents[-1][0] if parents else "Exception", code))
            parents.append((found[3], code))
    classes = [item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__]
    assert sorted(drawn) == sorted((item.__name__, item.__base__.__name__, item.exit_code) for item in classes)


def test_every_exit_code_belongs_to_one_branch() -> None:
    codes = [branch.exit_code for branch in errors.LineshaftError.__subclasses__()]
    assert len(set(codes)) == len(codes)
    assert all(code > 1 for code in codes)
