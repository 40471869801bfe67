"""Telemetry: every metric there is, in one table. `docs/reference/metrics.md` is made from it.

A part gets a `Telemetry` as an argument and speaks by name; a name that is not in the table is a
programming error and raises. Tests wait on the same names instead of sleeping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Seconds; from the quick step inside a process to a whole answer.
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: Final[tuple[Metric, ...]] = (
    Metric("headwater_runs_accepted_total", "counter", "Runs answered with 202.", ("kind",)),
    Metric("headwater_runs_claimed_total", "counter", "Claims of a run by a worker.", ("kind",)),
    Metric("headwater_runs_ended_total", "counter", "Runs that reached a terminal state.", ("kind", "state", "code")),
    Metric("headwater_runs_active", "gauge", "Runs held by this process now."),
    Metric("headwater_run_seconds", "histogram", "From claim to terminal event.", ("kind",)),
    Metric("headwater_first_token_seconds", "histogram", "From acceptance to the first content event.", ("kind",)),
    Metric("headwater_events_appended_total", "counter", "Events written to a log."),
    Metric("headwater_append_seconds", "histogram", "One append to a log, round trip."),
    Metric("headwater_appends_refused_total", "counter", "Appends the fence refused.", ("code",)),
    Metric("headwater_log_rewritten_total", "counter", "Logs written again after Redis lost them."),
    Metric("headwater_readers", "gauge", "Open subscriptions of the hub."),
    Metric("headwater_hub_batches_total", "counter", "Published messages that reached the hub."),
    Metric("headwater_hub_rereads_total", "counter", "Reads of a log by a reader.", ("reason",)),
    Metric("headwater_hub_reconnects_total", "counter", "Lost subscription connections."),
    Metric("headwater_stream_opened_total", "counter", "Streams opened by clients.", ("transport",)),
    Metric("headwater_journal_records_total", "counter", "Records made durable."),
    Metric("headwater_journal_commit_seconds", "histogram", "One group commit."),
    Metric("headwater_journal_backlog", "gauge", "Records not yet in PostgreSQL."),
    Metric("headwater_journal_backlog_age_seconds", "gauge", "Age of the oldest record not yet in PostgreSQL."),
    Metric("headwater_journal_poison", "gauge", "Records set aside because PostgreSQL refuses them."),
    Metric("headwater_synced_total", "counter", "Records applied to PostgreSQL."),
    Metric("headwater_swept_total", "counter", "Runs the sweeper acted on.", ("action",)),
    Metric("headwater_enqueue_seconds", "histogram", "Handing one run to Celery."),
    Metric("headwater_enqueue_failed_total", "counter", "Hand-overs to Celery that failed; the sweeper repeats them."),
    Metric("headwater_provider_retries_total", "counter", "Tries after the first.", ("code",)),
    Metric("headwater_provider_tokens_total", "counter", "Deltas received from the model's API."),
    Metric("headwater_http_requests_total", "counter", "Requests answered.", ("method", "route", "status")),
    Metric("headwater_http_seconds", "histogram", "Time to answer a request, streams excluded.", ("method", "route")),
    Metric("headwater_up", "gauge", "1 when a part answers its health check.", ("part",)),
)

Listener = Callable[[str, float, dict[str, str]], None]


class Telemetry:
    """The metrics of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {metric.name: self._make(metric) for metric in METRICS}
        self._listeners: list[Listener] = []

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        if metric.kind == "histogram":
            return Histogram(metric.name, metric.help, metric.labels, registry=self.registry, buckets=_SECONDS)
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(metric.name, metric.help, metric.labels, registry=self.registry)

    def listen(self, listener: Listener) -> None:
        """Hear of every count, gauge and observation: `listener(name, value, labels)`. For tests and monitors."""
        self._listeners.append(listener)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        self._of(name, labels).inc(amount)
        self._tell(name, amount, labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self._of(name, labels).set(value)
        self._tell(name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._of(name, labels).observe(value)
        self._tell(name, value, labels)

    def exposition(self) -> bytes:
        """The registry in Prometheus's text format."""
        return generate_latest(self.registry)

    def _of(self, name: str, labels: dict[str, str]) -> Any:
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric

    def _tell(self, name: str, value: float, labels: dict[str, str]) -> None:
        for listener in self._listeners:
            listener(name, value, labels)
