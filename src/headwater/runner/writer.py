"""Writer: the events of one attempt on their way into the log, gathered, numbered and kept until they are there.

The first text goes out at once; after that at most one append per flush interval, so that a model's
many small tokens share round trips. All events of the run stay in memory, packed (`kept`): when Redis comes
back empty, the worker that holds the run is the only place that still has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from headwater.clock import Clock
from headwater.errors import LogLost, LogRefused, LogUnavailable, RunFailed
from headwater.events import Event, EventType
from headwater.messages import mended
from headwater.runner.kept import Kept
from headwater.runner.leases import Hold, Stop
from headwater.runs import Run
from headwater.streams.base import Appended, StreamLog
from headwater.telemetry import Telemetry
from headwater.transcript import Transcript

logger = logging.getLogger(__name__)

#: Bytes that wait for one append before the pipeline has to wait as well.
MAX_WAITING: Final = 16_384
#: The same while Redis is away: the pipeline goes on, up to here.
MAX_WAITING_AWAY: Final = 4_194_304
#: Characters up to which text of one flush is joined into one event.
MAX_TEXT: Final = 4_096
#: Bytes of one run's log. Over it the run fails, because its memory and everybody's replay grow with it.
MAX_LOG: Final = 16_777_216
#: Seconds between tries while Redis is away: first and longest.
FIRST_RETRY: Final = 0.05
LAST_RETRY: Final = 1.0

_TEXT: Final = frozenset({EventType.CONTENT, EventType.REASONING})
_OURS: Final = frozenset({"seq", "type", "at"})


@dataclass(slots=True)
class _Waiting:
    """An event without a number yet; the pieces are the text of merged events."""

    type: EventType
    data: Mapping[str, Any]
    at: int
    pieces: list[str] | None
    size: int

    def stamped(self, seq: int) -> Event:
        data = self.data if self.pieces is None else {"text": "".join(self.pieces)}
        return Event(self.type, data).stamped(seq, self.at)


class Writer:
    """One attempt's pen. `add` from the pipeline, `flush` and `end` from the runner; one task flushes in between."""

    def __init__(
        self,
        log: StreamLog,
        hold: Hold,
        run: Run,
        events: Sequence[Event],
        *,
        clock: Clock,
        telemetry: Telemetry,
        flush: float,
    ) -> None:
        self.hold = hold
        self._log = log
        self._run = run
        self._clock = clock
        self._telemetry = telemetry
        self._interval = flush
        #: What is in the log, and what is numbered and on its way there.
        self._kept = Kept(events)
        self._batch: list[Event] = []
        self._bytes = sum(len(event.encode()) for event in events)
        self._waiting: list[_Waiting] = []
        self._size = 0
        self._spoken = False
        self._away = False
        self._stopping = False
        self._room = asyncio.Event()
        self._sending = asyncio.Lock()
        self._rest: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    # --- the pipeline's side --------------------------------------------------------------------

    def add(self, event: Event) -> None:
        """Take the next event. Raises ValueError for data that cannot be an event, RunFailed over the log's size."""
        if event.type in _TEXT:
            self._add_text(event)
        else:
            if not _OURS.isdisjoint(event.data):
                raise ValueError(f"an event's data must not hold {sorted(_OURS & event.data.keys())}")
            size = len(event.encode())
            self._append(_Waiting(event.type, event.data, self._clock.now_ms(), None, size))
        self.hold.wake.set()
        if self._size >= MAX_WAITING:
            self._end_rest()
        if self._bytes + self._size > MAX_LOG:
            raise RunFailed(
                f"The answer is longer than {MAX_LOG // 1_048_576} MB. Ask for less at once.", code="output_too_large"
            )

    @property
    def events(self) -> Sequence[Event]:
        """Every numbered event of the run, also those of earlier attempts. Costs a millisecond per thousand."""
        return [*self._kept, *self._batch]

    @property
    def transcript(self) -> Transcript:
        """What the run said so far, also what waits for its number because the log is away."""
        return Transcript.of(chain(self._kept, self._batch, (waiting.stamped(0) for waiting in self._waiting)))

    @property
    def full(self) -> bool:
        """Whether the pipeline should wait for `room`."""
        return self._size >= (MAX_WAITING_AWAY if self._away else MAX_WAITING)

    async def room(self) -> None:
        """Wait until there is room again."""
        while self.full:
            self._room.clear()
            await self._room.wait()

    def _add_text(self, event: Event) -> None:
        text = mended(event.data["text"])
        if not text:
            return
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.type is event.type and last.pieces is not None and last.size < MAX_TEXT:
            last.pieces.append(text)
            last.size += len(text)
            self._size += len(text)
        else:
            self._append(_Waiting(event.type, {}, self._clock.now_ms(), [text], len(text)))

    def _append(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self._size += waiting.size

    # --- the log's side -------------------------------------------------------------------------

    def start(self) -> asyncio.Task[None]:
        """Begin to flush by itself. The task ends early when the run is not ours any more."""
        self._task = asyncio.create_task(self._flush_for_ever(), name=f"writer {self._run.id}")
        return self._task

    async def stop(self) -> None:
        """End the flushing task after the append under way. What waits still waits."""
        task, self._task = self._task, None
        if task is None:
            return
        self._stopping = True
        # An append is not cut off in the middle: the connection it runs on would be lost with it.
        async with self._sending:
            task.cancel()
        await asyncio.wait({task})

    async def flush(self, *, patient: bool = False) -> bool:
        """Bring everything added so far into the log; False when there was nothing to write.

        Raises Fenced and LogClosed, and LogUnavailable unless `patient`, which tries until Redis is
        back or the worker goes down.
        """
        wrote = False
        async with self._sending:
            while self._unwritten():
                await self._round(lambda: patient)
                wrote = True
        return wrote

    async def end(self, event: Event, *, patient: bool = True) -> None:
        """Write the terminal event. Nothing can be added afterwards."""
        # Alone in its append: a repeat of it must be recognised whatever came before.
        await self.flush(patient=patient)
        self._append(_Waiting(event.type, event.data, event.at, None, 0))
        await self.flush(patient=patient)

    def _unwritten(self) -> bool:
        return bool(self._waiting or self._batch) or self.hold.lost

    async def _round(self, patient: Callable[[], bool]) -> None:
        if not self._batch:
            self._stamp()
        await self._deliver(patient)

    async def _flush_for_ever(self) -> None:
        while True:
            await self.hold.wake.wait()
            self.hold.wake.clear()
            try:
                async with self._sending:
                    if self._unwritten():
                        await self._round(lambda: not self._stopping)
            except LogRefused:
                self.hold.stop(Stop.FENCED)
                return
            except LogUnavailable:
                # The runner does not want to wait any longer and decides what becomes of the rest.
                return
            if self._spoken and self._interval > 0:
                await self._pause()

    async def _pause(self) -> None:
        if self._size >= MAX_WAITING:
            return
        loop = asyncio.get_running_loop()
        self._rest = loop.create_future()
        timer = loop.call_later(self._interval, self._end_rest)
        try:
            await self._rest
        finally:
            timer.cancel()
            self._rest = None

    def _end_rest(self) -> None:
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)

    def _stamp(self) -> None:
        for waiting in self._waiting:
            event = waiting.stamped(len(self._kept) + len(self._batch) + 1)
            self._batch.append(event)
            self._bytes += len(event.encode())
            self._spoken = self._spoken or event.type in _TEXT
        self._waiting.clear()
        self._size = 0
        self._room.set()

    async def _deliver(self, patient: Callable[[], bool]) -> None:
        """Write what is numbered and not yet in the log.

        The batch stays the same until it is in: only so is a repeat after a lost reply recognised.
        """
        delay = FIRST_RETRY
        while True:
            try:
                answer = await self._write()
                break
            except LogLost:
                first, self.hold.lost = not self.hold.lost, True
                if first:
                    continue
            except LogRefused as error:
                self._telemetry.count("headwater_appends_refused_total", code=error.code)
                raise
            except LogUnavailable as error:
                self._gone(error)
                if self.hold.draining.is_set() or not patient():
                    raise
            await nap(self.hold.draining, delay)
            delay = min(delay * 2, LAST_RETRY)
        self._away = False
        self._telemetry.count("headwater_events_appended_total", len(self._batch))
        self._kept.extend(self._batch)
        self._batch = []
        if answer.cancelled:
            self.hold.stop(Stop.CANCEL)

    async def _write(self) -> Appended:
        started = self._clock.monotonic()
        if self.hold.lost:
            events = self.events
            answer = await self._log.restore(self.hold.lease, self._run, events)
            self.hold.lost = False
            self._telemetry.count("headwater_log_rewritten_total")
            logger.warning("The log of run %s was lost; it is written again: %d events", self._run.id, len(events))
        else:
            answer = await self._log.append(self.hold.lease, self._batch)
        self._telemetry.observe("headwater_append_seconds", self._clock.monotonic() - started)
        return answer

    def _gone(self, error: LogUnavailable) -> None:
        if not self._away:
            logger.warning("Run %s goes on in memory, its log is away: %s", self._run.id, error)
        self._away = True
        self._room.set()


async def nap(unless: asyncio.Event, delay: float) -> None:
    """Wait about `delay` seconds before the next try, or until `unless`."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(unless.wait(), delay * random.uniform(0.5, 1.0))
