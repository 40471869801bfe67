from __future__ import annotations

import pytest

from headwater.telemetry import METRICS, Telemetry


def test_every_metric_of_the_table_is_exposed() -> None:
    telemetry = Telemetry()
    for metric in METRICS:
        labels = dict.fromkeys(metric.labels, "x")
        match metric.kind:
            case "counter":
                telemetry.count(metric.name, 1, **labels)
            case "gauge":
                telemetry.gauge(metric.name, 1, **labels)
            case "histogram":
                telemetry.observe(metric.name, 1, **labels)
    text = telemetry.exposition().decode()
    missing = [metric.name for metric in METRICS if f"# TYPE {metric.name.removesuffix('_total')}" not in text]
    assert missing == []


def test_a_name_outside_the_table_is_an_error() -> None:
    with pytest.raises(KeyError):
        Telemetry().count("headwater_unheard_of_total")


def test_listeners_hear_what_is_counted() -> None:
    telemetry = Telemetry()
    heard: list[tuple[str, float, dict[str, str]]] = []
    telemetry.listen(lambda name, value, labels: heard.append((name, value, labels)))
    telemetry.count("headwater_runs_accepted_total", kind="chat")
    assert heard == [("headwater_runs_accepted_total", 1, {"kind": "chat"})]
