"""Telemetry: every metric and every step there is, in two tables. `docs/reference/metrics.md` is made from them.

A part gets a `Telemetry` as an argument and speaks by name; a name that is not in the tables is a
programming error and raises. Tests wait on the same names instead of sleeping, and crash a process
at a step by name.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server

from headwater.errors import SettingsError

logger = logging.getLogger(__name__)

#: Seconds; from the quick step inside a process to a whole answer.
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    #: The processes that count it. A server takes part in a run too: it ends those that no worker need begin.
    where: Literal["server", "worker", "both"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: Final[tuple[Metric, ...]] = (
    Metric("headwater_runs_accepted_total", "counter", "server", "Runs answered with 202.", ("kind",)),
    Metric("headwater_runs_claimed_total", "counter", "both", "Claims of a run by a worker.", ("kind",)),
    Metric(
        "headwater_runs_ended_total",
        "counter",
        "both",
        "Runs that reached a terminal state.",
        ("kind", "state", "code"),
    ),
    Metric("headwater_runs_active", "gauge", "both", "Runs held by this process now."),
    Metric("headwater_run_seconds", "histogram", "both", "From claim to terminal event.", ("kind",)),
    Metric(
        "headwater_first_token_seconds", "histogram", "worker", "From acceptance to the first content event.", ("kind",)
    ),
    Metric("headwater_events_appended_total", "counter", "both", "Events written to a log."),
    Metric("headwater_append_seconds", "histogram", "both", "One append to a log, round trip."),
    Metric("headwater_appends_refused_total", "counter", "both", "Appends the fence refused.", ("code",)),
    Metric("headwater_log_rewritten_total", "counter", "both", "Logs written again after Redis lost them."),
    Metric("headwater_readers", "gauge", "server", "Open subscriptions of the hub."),
    Metric(
        "headwater_delivery_seconds",
        "histogram",
        "server",
        "From a worker taking an event to its first reader's socket, in whole milliseconds, flush interval included. "
        "One pushed batch in eight, never what was read again. Spans two hosts' clocks.",
    ),
    Metric("headwater_hub_batches_total", "counter", "server", "Published messages that reached the hub."),
    Metric("headwater_hub_rereads_total", "counter", "server", "Reads of a log by a reader.", ("reason",)),
    Metric("headwater_hub_reconnects_total", "counter", "server", "Lost subscription connections."),
    Metric("headwater_stream_opened_total", "counter", "server", "Streams opened by clients.", ("transport",)),
    Metric("headwater_journal_records_total", "counter", "both", "Records made durable."),
    Metric("headwater_journal_commit_seconds", "histogram", "both", "One group commit."),
    Metric("headwater_journal_backlog", "gauge", "both", "Records not yet in PostgreSQL."),
    Metric("headwater_journal_backlog_age_seconds", "gauge", "both", "Age of the oldest record not yet in PostgreSQL."),
    Metric("headwater_journal_poison", "gauge", "both", "Records set aside because PostgreSQL does not take them."),
    Metric("headwater_synced_total", "counter", "both", "Records applied to PostgreSQL."),
    Metric("headwater_swept_total", "counter", "both", "Runs the sweeper acted on.", ("action",)),
    Metric("headwater_enqueue_seconds", "histogram", "both", "Handing one run to Celery."),
    Metric(
        "headwater_enqueue_failed_total",
        "counter",
        "both",
        "Hand-overs to Celery that failed; the sweeper repeats them.",
    ),
    Metric(
        "headwater_loop_lag_seconds",
        "histogram",
        "worker",
        "How late the event loop is: something on it did not await.",
    ),
    Metric("headwater_provider_retries_total", "counter", "worker", "Tries after the first.", ("code",)),
    Metric("headwater_provider_tokens_total", "counter", "worker", "Deltas received from the model's API."),
    Metric("headwater_http_requests_total", "counter", "server", "Requests answered.", ("method", "route", "status")),
    Metric(
        "headwater_http_seconds",
        "histogram",
        "server",
        "Time to answer a request, streams excluded.",
        ("method", "route"),
    ),
    Metric("headwater_up", "gauge", "server", "1 when a part answers its health check.", ("part",)),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A place between two effects, where a crash leaves the first done and the second not."""

    name: str
    #: The process that comes here, and need not come back.
    where: Literal["server", "worker"]
    help: str


STEPS: Final[tuple[Step, ...]] = (
    Step("accept.planned", "server", "A message is checked; nothing is written yet."),
    Step("accept.journalled", "server", "It is in the journal; PostgreSQL has not committed it."),
    Step("accept.stored", "server", "PostgreSQL has committed it; the journal still has it to bring there."),
    Step("accept.announced", "server", "Redis knows the run; it is not handed to Celery."),
    Step("accept.enqueued", "server", "It is handed to Celery, as far as it got; the caller has no reply."),
    Step("cancel.flagged", "server", "Redis has a cancel's flag; the journal has not noted it."),
    Step("cancel.noted", "server", "The journal has noted a cancel; the caller has no reply."),
    Step("claim.claimed", "worker", "A worker holds the lease; no row says so."),
    Step("claim.saved", "worker", "The row says that the run is running."),
    Step("save.journalled", "worker", "Rows of a run are in the journal; PostgreSQL has not got them."),
    Step("finish.written", "worker", "Every event but the last is in the log; the answer is not saved."),
    Step("finish.saved", "worker", "The answer is saved; its terminal event is not written."),
    Step("finish.told", "worker", "The terminal event is written; Celery's message is not acknowledged."),
    Step("sync.applied", "worker", "PostgreSQL has a batch of records; the journal does not know."),
    Step("sync.marked", "worker", "The journal knows that PostgreSQL has them."),
)
_STEPS: Final = frozenset(step.name for step in STEPS)


class _Histogram(Histogram):
    """Takes many equal observations in one step, which the library has no word for."""

    def observe_times(self, amount: float, times: int) -> None:
        self._sum.inc(amount * times)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(times)


class _Named(CollectorRegistry):
    """A registry as it is shown: with the process named in every series."""

    def __init__(self, registry: CollectorRegistry, process: str) -> None:
        super().__init__()
        self._shown = registry
        self._process = process

    def collect(self) -> Iterator[Any]:
        for family in self._shown.collect():
            named = [one._replace(labels={**one.labels, "process": self._process}) for one in family.samples]
            family.samples = named
            yield family


Listener = Callable[[str, float, dict[str, str]], None]


class Telemetry:
    """The metrics of one process, in a registry of its own.

    With `process`, every series carries that label: whoever reads them where several processes answer by turns gets a
    series for each, and none that jumps between them.
    """

    def __init__(self, process: str = "") -> None:
        self._process = process
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {metric.name: self._make(metric) for metric in METRICS}
        self._listeners: list[Listener] = []

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        if metric.kind == "histogram":
            return _Histogram(metric.name, metric.help, metric.labels, registry=self.registry, buckets=_SECONDS)
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(metric.name, metric.help, metric.labels, registry=self.registry)

    def listen(self, listener: Listener) -> None:
        """Hear of every count, gauge, observation and step: `listener(name, value, labels)`. For tests and monitors."""
        self._listeners.append(listener)

    def step(self, name: str) -> None:
        """A step of the table is reached. Costs nothing unless somebody listens."""
        if name not in _STEPS:
            raise KeyError(name)
        self._tell(name, 1, {})

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        self._of(name, labels).inc(amount)
        self._tell(name, amount, labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self._of(name, labels).set(value)
        self._tell(name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._of(name, labels).observe(value)
        self._tell(name, value, labels)

    def observe_times(self, name: str, value: float, times: int) -> None:
        """Note so many equal values. A listener hears of it once."""
        self._of(name, {}).observe_times(value, times)
        self._tell(name, value, {})

    def exposition(self) -> bytes:
        """The registry in Prometheus's text format."""
        return generate_latest(_Named(self.registry, self._process) if self._process else self.registry)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Serve the exposition over HTTP in a thread, for a process without a web server. Returns what ends it.

        Raises OSError when the port cannot be bound. Blocks, as what it returns does.
        """
        server, thread = start_http_server(port, host, self.registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close

    def _of(self, name: str, labels: dict[str, str]) -> Any:
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric

    def _tell(self, name: str, value: float, labels: dict[str, str]) -> None:
        for listener in self._listeners:
            listener(name, value, labels)


def arm(telemetry: Telemetry, failpoint: str | None) -> None:
    """Let this process end as by SIGKILL when it comes to a step; `name:n` means the n-th time.

    To show that a crash there loses nothing and doubles nothing. Raises SettingsError for a step that
    does not exist.
    """
    if failpoint is None:
        return
    name, _, nth = failpoint.partition(":")
    if name not in _STEPS or not (nth or "1").isdigit():
        names = ", ".join(step.name for step in STEPS)
        raise SettingsError(f"HEADWATER_FAILPOINT={failpoint} is not NAME or NAME:N. Names: {names}.")
    left = int(nth or "1")

    def crash(heard: str, _value: float, _labels: dict[str, str]) -> None:
        nonlocal left
        if heard == name:
            left -= 1
            if left == 0:
                logger.critical("This process ends at its failpoint %s", failpoint)
                # Not an exception: nothing may be cleaned up, flushed or told.
                os._exit(137)

    telemetry.listen(crash)
