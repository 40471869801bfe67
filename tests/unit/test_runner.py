"""The runner over the memory log and scripted pipelines: every way a run can end, and what must stay true."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwater.clock import FrozenClock
from headwater.errors import JournalUnavailable, LogUnavailable, ProviderError, StoreUnavailable
from headwater.events import Event, EventType, content, done, log, progress, reasoning, usage
from headwater.messages import Message, MessageStatus
from headwater.pipelines.base import OnWorkerLost, Pipeline
from headwater.records import Record
from headwater.replay import Replay
from headwater.runner import Runner
from headwater.runner.attempt import Shares
from headwater.runner.writer import MAX_TEXT
from headwater.runs import Lease, Run, RunState
from headwater.service import running
from headwater.settings import Settings
from headwater.streams.base import Appended, Renewed
from headwater.streams.memory import MemoryStreamLog
from headwater.telemetry import Telemetry
from headwater.transcript import Transcript
from support.rough import VirtualLoop
from support.runs import ScriptedPipeline, new_run
from support.wait import eventually

CANCELLED = Event(EventType.CANCELLED, {})


class ShakyLog(MemoryStreamLog):
    """A memory log that can be away, and that can lose a reply: the write counts, the caller hears an error."""

    def __init__(self, clock: FrozenClock) -> None:
        super().__init__(ttl=3600, lease_seconds=10, clock=clock)
        self.away = False
        self.lose_replies = 0
        self.lose_claims = 0
        self.tries = 0

    def _check(self) -> None:
        self.tries += 1
        if self.away:
            raise LogUnavailable("away")

    async def append(self, lease: Lease, events: Sequence[Event]) -> Appended:
        self._check()
        appended = await super().append(lease, events)
        if self.lose_replies:
            self.lose_replies -= 1
            raise LogUnavailable("the reply was lost")
        return appended

    async def restore(self, lease: Lease, run: Run, events: Sequence[Event]) -> Appended:
        self._check()
        return await super().restore(lease, run, events)

    async def claim(self, run: Run, holder: str) -> Lease:
        self._check()
        lease = await super().claim(run, holder)
        if self.lose_claims:
            self.lose_claims -= 1
            raise LogUnavailable("the reply was lost")
        return lease

    async def renew(self, leases: Sequence[Lease]) -> list[Renewed]:
        self._check()
        return await super().renew(leases)


class Bench:
    """A runner, its log, and what was saved, requeued and counted."""

    def __init__(self, *pipelines: Pipeline, **changes: Any) -> None:
        self.clock = FrozenClock()
        self.log = ShakyLog(self.clock)
        self.saved: list[Sequence[Record]] = []
        self.save_error: Exception | None = None
        self.before_save: Callable[[Sequence[Record]], Awaitable[None]] | None = None
        self.stored: Run | None = None
        self.stored_message: Message | None = None
        self.store_away = False
        self.requeued: list[Run] = []
        self.shares: Shares | None = None
        self.telemetry = Telemetry()
        self.counted: list[tuple[str, dict[str, str]]] = []
        self.telemetry.listen(lambda name, value, labels: self.counted.append((name, labels)))
        self.pipelines = {each.kind: each for each in pipelines}
        self.settings = Settings(**{"flush_ms": 1, **changes})
        self.runner = self.new_runner()

    def new_runner(self) -> Runner:
        """Another worker over the same log and rows."""
        return Runner(
            self.log,
            self.pipelines,
            self.save,
            clock=self.clock,
            telemetry=self.telemetry,
            settings=self.settings,
            known=self.known,
            requeue=self.requeued.append,
            history=Replay(self.known, self.message).page,
            shares=self.shares,
        )

    async def save(self, records: Sequence[Record]) -> None:
        if self.before_save is not None:
            await self.before_save(records)
        if self.save_error is not None:
            raise self.save_error
        self.saved.append(records)

    async def message(self, message_id: str) -> Message | None:
        return self.stored_message

    async def known(self, run_id: str) -> Run | None:
        if self.store_away:
            raise StoreUnavailable("away")
        return self.stored

    async def accepted(self, **members: Any) -> Run:
        run = new_run(**members)
        await self.log.open(run, 15)
        return run

    async def events(self, run: Run) -> list[Event]:
        events: list[Event] = []
        # A page ends early when it is large.
        while (page := await self.log.read(run.id, len(events), 100_000)) is not None and page.events:
            events += page.events
        return events

    def rows(self) -> dict[str, Run | Message]:
        """What was saved last, by kind."""
        things = [record.thing() for record in self.saved[-1]]
        return {type(thing).__name__.lower(): thing for thing in things}  # type: ignore[misc]

    async def expire(self, seconds: float = 11) -> None:
        self.clock.advance(seconds)

    async def check_end(self, run: Run, end: EventType) -> list[Event]:
        """Dense seqs, exactly one terminal event, of this type, and rows that say the same."""
        events = await self.events(run)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.type for event in events if event.terminal] == [end]
        assert events[-1].type is end
        rows = self.rows()
        state = {EventType.DONE: "done", EventType.ERROR: "failed", EventType.CANCELLED: "cancelled"}[end]
        row, message = rows["run"], rows["message"]
        assert isinstance(row, Run)
        assert isinstance(message, Message)
        assert row.state == state
        assert message.status == state
        assert message.content == Transcript.of(events).content
        assert message.version == row.version
        return events


def saying(*events: Event) -> ScriptedPipeline:
    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        for event in events:
            yield event

    return ScriptedPipeline(script)


class Gate:
    """A pipeline that says something, waits to be let on, and goes on."""

    def __init__(self, before: Sequence[Event], after: Sequence[Event] = (), **options: Any) -> None:
        self.open = asyncio.Event()
        self.reached = asyncio.Event()

        async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
            for event in before:
                yield event
            self.reached.set()
            await self.open.wait()
            for event in after:
                yield event

        self.pipeline = ScriptedPipeline(script, **options)


async def in_log(bench: Bench, run: Run, text: str) -> None:
    """Wait until the log holds this much."""

    async def there() -> bool:
        return Transcript.of(await bench.events(run)).content == text

    await eventually(there)


# --- how a run ends -------------------------------------------------------------------------------


async def test_a_pipeline_that_returns_ends_done_with_rows_and_usage() -> None:
    bench = Bench(saying(reasoning("Hm."), content("Hello"), usage(3, 2)))
    run = await bench.accepted()
    ended = await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    assert [event.type for event in events] == ["state", "reasoning", "content", "usage", "done"]
    assert events[0].data == {"state": "running", "attempt": 1}
    assert events[-1].data == {
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "estimated": False},
        "message_id": run.message_id,
    }
    assert ended is not None
    assert (ended.state, ended.attempt, ended.usage) == (RunState.DONE, 1, events[-1].data["usage"])
    assert ended == bench.rows()["run"]


async def test_the_running_row_is_saved_before_the_ended_one() -> None:
    bench = Bench(saying(content("x")))
    await bench.runner.execute(await bench.accepted(), "w")
    states = [record.thing().state for records in bench.saved for record in records if record.kind == "run"]  # type: ignore[union-attr]
    assert states == [RunState.RUNNING, RunState.DONE]


async def test_a_done_of_the_pipeline_keeps_its_reason_and_ends_the_pipeline() -> None:
    bench = Bench(saying(content("x"), done("length"), content("never")))
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    assert events[-1].data["finish_reason"] == "length"
    assert Transcript.of(events).content == "x"


async def test_a_failure_with_a_code_ends_with_that_code_and_keeps_what_was_said() -> None:
    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        yield content("Half")
        raise ProviderError("Too many requests.", code="provider_rate_limited", retryable=True)

    bench = Bench(ScriptedPipeline(script))
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.ERROR)
    assert {"code": "provider_rate_limited", "message": "Too many requests.", "retryable": True}.items() <= events[
        -1
    ].data.items()
    message = bench.rows()["message"]
    assert isinstance(message, Message)
    assert (message.content, message.error) == (
        "Half",
        {"code": "provider_rate_limited", "message": "Too many requests.", "retryable": True},
    )


async def test_what_nobody_expected_ends_as_internal_without_quoting_it(caplog: pytest.LogCaptureFixture) -> None:
    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        yield content("x")
        raise KeyError("sk-secret")

    bench = Bench(ScriptedPipeline(script))
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.ERROR)
    assert events[-1].data["code"] == "internal"
    assert b"sk-secret" not in b"".join(event.encode() for event in events)
    assert "sk-secret" in caplog.text


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, MemoryError])
async def test_what_is_no_ordinary_exception_ends_the_run_and_not_its_worker(raised: type[BaseException]) -> None:
    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        yield content("x")
        raise raised

    bench = Bench(ScriptedPipeline(script))
    run = await bench.accepted()
    ended = await bench.runner.execute(run, "w")
    assert ended is not None
    assert ended.state is RunState.FAILED
    events = await bench.check_end(run, EventType.ERROR)
    assert events[-1].data["code"] == "internal"
    assert Transcript.of(events).content == "x"


@pytest.mark.parametrize(
    "bad",
    [Event(EventType.PROGRESS, {"stage": object()}), Event(EventType.LOG, {"seq": 7}), Event(EventType.CONTENT, {})],
    ids=["not JSON", "our own field", "no text"],
)
async def test_an_event_that_cannot_be_written_fails_the_run_and_not_the_worker(bad: Event) -> None:
    bench = Bench(saying(content("x"), bad, content("y")))
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.ERROR)
    assert events[-1].data["code"] == "internal"
    assert Transcript.of(events).content == "x"


async def test_a_run_over_its_deadline_fails_and_its_pipeline_is_closed() -> None:
    gate = Gate([content("slow")], deadline=0.05)
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.ERROR)
    assert events[-1].data["code"] == "deadline"
    assert gate.pipeline.closed.is_set()


async def test_a_kind_that_no_worker_knows_fails_by_name() -> None:
    bench = Bench()
    run = await bench.accepted(kind="unheard")
    ended = await bench.runner.execute(run, "w")
    assert ended is not None
    assert ended.error is not None
    assert ended.error["code"] == "unknown_kind"
    assert [event.type for event in await bench.events(run)] == [EventType.ERROR]


async def test_results_that_cannot_be_made_end_the_run_as_internal() -> None:
    class Broken(ScriptedPipeline):
        def results(self, run: Run, transcript: Transcript) -> Sequence[Message]:
            raise RuntimeError("no rows")

    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        yield content("x")

    bench = Bench(Broken(script))
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.events(run)
    assert [event.data.get("code") for event in events if event.terminal] == ["internal"]
    row = bench.rows()["run"]
    assert isinstance(row, Run)
    assert row.state is RunState.FAILED


async def test_a_journal_that_is_full_does_not_keep_the_end_from_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(saying(content("x")))
    bench.save_error = JournalUnavailable("full")
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    assert [event.type for event in await bench.events(run) if event.terminal] == [EventType.DONE]
    assert "made again from its log" in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    # Space returns: the log has all that the rows need.
    bench.save_error = None
    repaired = await bench.runner.repair(run)
    await bench.check_end(run, EventType.DONE)
    assert repaired == bench.rows()["run"]


async def test_the_rows_made_from_the_log_equal_those_that_were_saved() -> None:
    bench = Bench(saying(content("Hello"), progress("write", 0.5), usage(1, 2)))
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    saved = bench.rows()
    await bench.runner.repair(run)
    again = bench.rows()
    # The moment it began is not in the log.
    assert again["message"] == saved["message"]
    assert {**again["run"].to_json(), "started_at": None} == {**saved["run"].to_json(), "started_at": None}


async def test_a_run_that_has_not_ended_is_not_repaired() -> None:
    bench = Bench(saying())
    run = await bench.accepted()
    assert await bench.runner.repair(run) is None
    assert await bench.runner.repair(new_run()) is None
    assert bench.saved == []


# --- cancel ---------------------------------------------------------------------------------------


async def test_a_cancel_closes_the_pipeline_and_keeps_what_was_said() -> None:
    gate = Gate([content("Half")], [content(" whole")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "Half")
    await bench.log.cancel(run.id)
    # The pipeline says nothing more, so only the renewal can tell.
    await bench.runner.leases.renew()
    ended = await task
    assert ended is not None
    assert ended.state is RunState.CANCELLED
    await bench.check_end(run, EventType.CANCELLED)
    assert gate.pipeline.closed.is_set()


async def test_a_cancel_is_heard_with_the_next_append() -> None:
    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        while True:
            yield content("more ")
            await asyncio.sleep(0.001)

    pipeline = ScriptedPipeline(script)
    bench = Bench(pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await eventually(lambda: pipeline.calls)
    await bench.log.cancel(run.id)
    await task
    await bench.check_end(run, EventType.CANCELLED)


async def test_a_run_cancelled_before_its_claim_never_reaches_the_pipeline() -> None:
    pipeline = saying(content("x"))
    bench = Bench(pipeline)
    run = await bench.accepted()
    await bench.log.cancel(run.id)
    await bench.runner.execute(run, "w")
    assert [event.type for event in await bench.events(run)] == [EventType.CANCELLED]
    assert pipeline.calls == 0
    await bench.check_end(run, EventType.CANCELLED)


async def test_a_pipeline_that_ignores_its_cancel_cannot_write_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.runner.attempt.CLOSE_GRACE", 0.05)
    release = asyncio.Event()

    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        yield content("x")
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        yield content("late")

    pipeline = ScriptedPipeline(script)
    bench = Bench(pipeline)

    async def wakes_up(records: Sequence[Record]) -> None:
        # At the worst moment: after the rows were made, before the terminal event.
        if len(records) > 1:
            release.set()
            await pipeline.closed.wait()

    bench.before_save = wakes_up
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "x")
    await bench.log.cancel(run.id)
    await bench.runner.leases.renew()
    await task
    events = await bench.check_end(run, EventType.CANCELLED)
    assert Transcript.of(events).content == "x"


# --- who may run ----------------------------------------------------------------------------------


async def test_a_run_that_somebody_holds_is_left_alone() -> None:
    pipeline = saying(content("x"))
    bench = Bench(pipeline)
    run = await bench.accepted()
    await bench.log.claim(run, "other")
    assert await bench.runner.execute(run, "w") is None
    assert pipeline.calls == 0


async def test_two_executions_of_one_run_give_one_stream() -> None:
    gate = Gate([content("a")], [content("b")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    first = asyncio.create_task(bench.runner.execute(run, "w1"))
    await gate.reached.wait()
    assert await bench.runner.execute(run, "w2") is None
    gate.open.set()
    await first
    assert await bench.runner.execute(run, "w3") is None
    await bench.check_end(run, EventType.DONE)
    assert gate.pipeline.calls == 1


async def test_a_message_that_comes_again_after_the_log_expired_starts_nothing() -> None:
    pipeline = saying(content("x"))
    bench = Bench(pipeline)
    run = new_run()
    bench.stored = run.started(1, 1).ended(RunState.DONE, 2)
    assert await bench.runner.execute(run, "w") is None
    assert pipeline.calls == 0
    assert await bench.log.meta(run.id) is None


async def test_a_run_that_only_its_row_knows_goes_on_above_the_rows_attempt() -> None:
    bench = Bench(saying(content("x")))
    run = new_run()
    bench.stored = run.started(2, 1)
    ended = await bench.runner.execute(run, "w")
    assert ended is not None
    assert ended.attempt == 3


async def test_a_run_is_executed_although_the_store_cannot_be_asked() -> None:
    bench = Bench(saying(content("x")))
    bench.store_away = True
    run = new_run()
    await bench.runner.execute(run, "w")
    await bench.check_end(run, EventType.DONE)


# --- attempts after a lost worker -----------------------------------------------------------------


async def interrupted(bench: Bench, *events: Event) -> Run:
    """A run whose first attempt said this and died."""
    run = await bench.accepted()
    lease = await bench.log.claim(run, "dead")
    state = Event(EventType.STATE, {"state": "running", "attempt": 1})
    await bench.log.append(lease, [event.stamped(seq, seq) for seq, event in enumerate([state, *events], 1)])
    await bench.expire()
    return run


async def test_the_next_attempt_takes_back_what_was_shown_and_begins_again() -> None:
    bench = Bench(saying(content("New")))
    run = await interrupted(bench, content("Old"))
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    assert [event.type for event in events] == ["state", "content", "reset", "state", "content", "done"]
    assert events[2].data == {"reason": "worker_lost", "attempt": 2}
    assert Transcript.of(events).content == "New"


async def test_nothing_is_taken_back_when_nothing_was_shown() -> None:
    bench = Bench(saying(content("New")))
    run = await interrupted(bench)
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    assert EventType.RESET not in {event.type for event in events}


async def test_a_kind_that_is_interrupted_keeps_its_partial_answer() -> None:
    pipeline = saying(content("New"))
    pipeline.on_worker_lost = OnWorkerLost.INTERRUPT  # type: ignore[misc]
    bench = Bench(pipeline)
    run = await interrupted(bench, content("Old"))
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.ERROR)
    assert events[-1].data["code"] == "worker_lost"
    assert Transcript.of(events).content == "Old"
    assert pipeline.calls == 0


async def test_a_kind_that_continues_is_told_what_was_said() -> None:
    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        yield content(f"and not {said.content!r} again")

    bench = Bench(ScriptedPipeline(script, lost=OnWorkerLost.CONTINUE))
    run = await interrupted(bench, content("Old "))
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    assert Transcript.of(events).content == "Old and not 'Old ' again"


async def test_a_claim_whose_reply_is_lost_spends_no_attempt() -> None:
    bench = Bench(saying(content("x")), max_attempts=3)
    run = await bench.accepted()
    bench.log.lose_claims = 3
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    assert events[0].data == {"state": "running", "attempt": 1}


async def test_a_run_whose_attempts_are_spent_fails_without_another() -> None:
    pipeline = saying(content("x"))
    bench = Bench(pipeline, max_attempts=3)
    run = await bench.accepted()
    for _ in range(3):
        await bench.log.claim(run, "dead")
        await bench.expire()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.ERROR)
    assert events[-1].data["code"] == "worker_lost"
    assert "3 times" in events[-1].data["message"]
    assert pipeline.calls == 0


@pytest.mark.parametrize("fault", ["complete", "history"])
async def test_what_nobody_expected_before_the_claim_spends_an_attempt_each_time(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_page(replay: Replay, run_id: str) -> None:
        raise RuntimeError("secret detail")

    def no_input(pipeline: Pipeline, run: Run, answers: object) -> Run:
        raise RuntimeError("secret detail")

    if fault == "complete":
        monkeypatch.setattr(ScriptedPipeline, "complete", no_input)
    else:
        monkeypatch.setattr(Replay, "page", no_page)
    pipeline = saying(content("x"))
    bench = Bench(pipeline)
    run = await bench.accepted(waits_for=("before",))
    behind = new_run()
    await bench.log.park(behind, [run.id], 15)
    for attempt in range(1, 4):
        meta = await bench.log.meta(run.id)
        assert meta is not None
        # Released each time, so that nobody waits for a lease.
        assert (meta.status, meta.lease_left, meta.attempt) == (RunState.QUEUED, 0, attempt - 1)
        with pytest.raises(RuntimeError):
            await bench.runner.execute(run, f"w{attempt}")
    (end,) = await bench.check_end(run, EventType.ERROR)
    assert end.data["code"] == "internal"
    assert "secret" not in end.data["message"]
    assert [each.id for each in bench.requeued] == [behind.id]
    with pytest.raises(RuntimeError):
        await bench.runner.execute(run, "later")
    assert await bench.events(run) == [end]
    assert pipeline.calls == 0


async def test_an_end_that_was_saved_but_not_said_is_said_by_the_next_attempt() -> None:
    pipeline = saying(content("Again"))
    bench = Bench(pipeline)
    run = await interrupted(bench, content("Whole"))
    counted = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4, "estimated": False}
    bench.stored = run.started(1, 1).ended(RunState.DONE, 2, usage=counted)
    bench.stored_message = pipeline.results(bench.stored, Transcript.of([content("Whole")]))[0]
    await bench.runner.execute(run, "w")
    events = await bench.events(run)
    assert [event.type for event in events] == ["state", "content", "done"]
    assert events[-1].data["usage"] == counted
    assert pipeline.calls == 0
    assert bench.saved == []


async def test_what_a_dead_worker_saved_and_did_not_say_is_told_again_whole_by_the_attempt_that_tells_it() -> None:
    pipeline = saying(content("Again"))
    bench = Bench(pipeline)
    run = await interrupted(bench, content("Wh"))
    bench.stored = run.started(1, 1).ended(RunState.DONE, 2)
    bench.stored_message = pipeline.results(bench.stored, Transcript.of([content("Whole")]))[0]
    await bench.runner.execute(run, "w")
    events = await bench.events(run)
    assert [event.type for event in events] == ["state", "content", "reset", "state", "content", "done"]
    assert [event.data["attempt"] for event in events if "attempt" in event.data] == [1, 2, 2]
    assert Transcript.of(events).content == "Whole"


# --- the fence ------------------------------------------------------------------------------------


async def test_a_worker_that_lost_its_run_stops_and_saves_nothing_more() -> None:
    gate = Gate([content("zombie")], [content(" late")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "zombie"))
    await in_log(bench, run, "zombie")
    await bench.expire()
    lease = await bench.log.claim(run, "heir")
    saved = list(bench.saved)
    gate.open.set()
    assert await task is None
    assert await bench.log.renew([lease]) == [Renewed.HELD]
    assert Transcript.of(await bench.events(run)).content == "zombie"
    assert bench.saved == saved
    assert ("headwater_appends_refused_total", {"code": "fenced"}) in bench.counted


async def test_a_silent_worker_that_lost_its_run_is_told_by_the_renewal() -> None:
    gate = Gate([content("zombie")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "zombie"))
    await in_log(bench, run, "zombie")
    await bench.expire()
    await bench.log.claim(run, "heir")
    await bench.runner.leases.renew()
    assert await task is None
    assert gate.pipeline.closed.is_set()


async def test_a_worker_that_lost_its_run_at_the_very_end_does_not_end_it() -> None:
    gate = Gate([content("all")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "zombie"))
    await in_log(bench, run, "all")
    await bench.expire()
    await bench.log.claim(run, "heir")
    saved = len(bench.saved)
    gate.open.set()
    assert await task is None
    assert len(bench.saved) == saved
    assert not any(event.terminal for event in await bench.events(run))


# --- Redis away and Redis empty -------------------------------------------------------------------


async def test_a_log_that_is_away_is_written_when_it_is_back() -> None:
    gate = Gate([content("a")], [content("b"), content("c")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    bench.log.away = True
    gate.open.set()
    await gate.pipeline.closed.wait()
    # The answer is whole and kept although nobody can be told.
    await eventually(lambda: "message" in bench.rows())
    assert Transcript.of(await bench.events(run)).content == "a"
    bench.log.away = False
    await task
    events = await bench.check_end(run, EventType.DONE)
    assert Transcript.of(events).content == "abc"


async def test_what_is_said_while_an_append_waits_for_its_log_is_saved_as_well() -> None:
    speak, end = asyncio.Event(), asyncio.Event()

    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        yield content("a")
        await speak.wait()
        yield content("b")
        await end.wait()
        yield content("c")

    bench = Bench(ScriptedPipeline(script))
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    bench.log.away, tries = True, bench.log.tries
    speak.set()
    # "b" has its number and is tried in vain; "c" comes behind it.
    await eventually(lambda: bench.log.tries > tries)
    end.set()
    await eventually(lambda: "message" in bench.rows())
    bench.log.away = False
    await task
    events = await bench.check_end(run, EventType.DONE)
    message = bench.rows()["message"]
    assert isinstance(message, Message)
    assert message.content == Transcript.of(events).content == "abc"


async def test_a_lost_reply_doubles_nothing() -> None:
    bench = Bench(saying(content("a"), reasoning("b"), content("c")))
    bench.log.lose_replies = 2
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    assert Transcript.of(events).content == "ac"


async def test_a_lost_log_is_written_again_under_its_epoch() -> None:
    gate = Gate([content("a")], [content("b")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    before = await bench.log.meta(run.id)
    await bench.log.forget(run.id)
    gate.open.set()
    await task
    after = await bench.log.meta(run.id)
    assert before is not None
    assert after is not None
    assert after.epoch == before.epoch
    events = await bench.check_end(run, EventType.DONE)
    assert Transcript.of(events).content == "ab"
    assert ("headwater_log_rewritten_total", {}) in bench.counted


async def test_a_lost_log_is_written_again_while_the_pipeline_is_silent() -> None:
    gate = Gate([content("a")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    await bench.log.forget(run.id)
    await bench.runner.leases.renew()
    await in_log(bench, run, "a")
    gate.open.set()
    await task
    await bench.check_end(run, EventType.DONE)


async def test_a_later_attempt_restores_what_earlier_ones_wrote() -> None:
    gate = Gate([content("new")], [content("er")])
    bench = Bench(gate.pipeline)
    run = await interrupted(bench, content("old"))
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "new")
    before = await bench.events(run)
    await bench.log.forget(run.id)
    gate.open.set()
    await task
    events = await bench.check_end(run, EventType.DONE)
    assert events[: len(before)] == before


async def test_a_claim_waits_for_a_log_that_is_away() -> None:
    bench = Bench(saying(content("x")))
    run = await bench.accepted()
    bench.log.away = True
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await eventually(lambda: bench.log.tries >= 2)
    bench.log.away = False
    await task
    await bench.check_end(run, EventType.DONE)


async def test_a_claim_that_had_to_wait_for_its_log_keeps_no_place_behind() -> None:
    class Places:
        held = 0

        async def admit(self, run: Run) -> bool:
            self.held += 1
            return True

        def let_go(self, run: Run) -> None:
            self.held -= 1

        async def ended(self, run: Run) -> None: ...

    bench = Bench(saying(content("x")))
    bench.shares = places = Places()
    bench.runner = bench.new_runner()
    run = await bench.accepted()
    bench.log.away = True
    task = asyncio.create_task(bench.runner.execute(run, "w1"))
    await eventually(lambda: bench.log.tries >= 2)
    bench.log.away = False
    await task
    assert places.held == 0


async def test_leases_are_kept_through_a_log_that_is_away() -> None:
    gate = Gate([content("a")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    bench.log.away = True
    await bench.runner.leases.renew()
    bench.log.away = False
    await bench.runner.leases.renew()
    gate.open.set()
    await task
    await bench.check_end(run, EventType.DONE)


def test_a_short_lease_is_renewed_several_times_before_it_ends() -> None:
    async def renewals() -> int:
        gate = Gate([content("a")])
        bench = Bench(gate.pipeline, lease_seconds=1)
        run = await bench.accepted()
        task = asyncio.create_task(bench.runner.execute(run, "w"))
        await in_log(bench, run, "a")
        before = bench.log.tries
        async with running(bench.runner.leases):
            await asyncio.sleep(0.99)
        renewed = bench.log.tries - before
        gate.open.set()
        await task
        return renewed

    # Its time passes by itself, so the count does not depend on how busy the machine is.
    loop = VirtualLoop()
    try:
        assert loop.run_until_complete(renewals()) == 3
    finally:
        loop.close()


# --- the worker goes down -------------------------------------------------------------------------


async def test_a_drain_hands_the_run_over_and_the_next_worker_ends_it() -> None:
    gate = Gate([content("a")], [content("b")])
    bench = Bench(gate.pipeline, max_attempts=1)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "leaving"))
    await in_log(bench, run, "a")
    await bench.runner.drain()
    assert await task is None
    assert gate.pipeline.closed.is_set()
    assert [each.id for each in bench.requeued] == [run.id]
    assert not any(event.terminal for event in await bench.events(run))
    # At once, without waiting for the lease; and leaving is not dying, so no attempt is spent.
    gate.open.set()
    await bench.new_runner().execute(bench.requeued[0], "next")
    events = await bench.check_end(run, EventType.DONE)
    assert Transcript.of(events).content == "ab"
    assert [event.data["reason"] for event in events if event.type is EventType.RESET] == ["handed_over"]


async def test_a_worker_that_drains_takes_nothing_new() -> None:
    pipeline = saying(content("x"))
    bench = Bench(pipeline)
    run = await bench.accepted()
    await bench.runner.drain()
    assert await bench.runner.execute(run, "w") is None
    assert (pipeline.calls, bench.requeued) == (0, [run])


async def test_an_execution_that_is_cancelled_from_outside_hands_its_run_over() -> None:
    gate = Gate([content("a")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    meta = await bench.log.meta(run.id)
    assert meta is not None
    assert (meta.status, meta.lease_left) == (RunState.QUEUED, 0)
    assert [each.id for each in bench.requeued] == [run.id]


async def test_a_kind_that_is_interrupted_ends_when_its_worker_leaves() -> None:
    gate = Gate([content("a")], lost=OnWorkerLost.INTERRUPT)
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    await bench.runner.drain()
    await task
    events = await bench.check_end(run, EventType.ERROR)
    assert events[-1].data["code"] == "worker_lost"


async def test_a_drain_does_not_wait_for_a_log_that_is_away() -> None:
    gate = Gate([content("a")], [content("b")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    bench.log.away = True
    await bench.runner.drain()
    assert await task is None
    assert [each.id for each in bench.requeued] == [run.id]


async def test_a_drain_does_not_wait_to_say_an_end_that_is_saved() -> None:
    gate = Gate([content("a")], [content("b")])
    bench = Bench(gate.pipeline)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    bench.log.away = True
    gate.open.set()
    await eventually(lambda: "message" in bench.rows())
    await bench.runner.drain()
    assert task.done()
    assert await task is None
    # The next worker finds the rows. What the log lacks it tells from them, and says so.
    row, message = bench.rows()["run"], bench.rows()["message"]
    assert isinstance(row, Run)
    assert isinstance(message, Message)
    bench.stored, bench.stored_message, bench.log.away = row, message, False
    await bench.expire()
    await bench.new_runner().execute(bench.requeued[0], "next")
    events = await bench.check_end(run, EventType.DONE)
    assert Transcript.of(events).content == "ab"
    assert [event.type for event in events] == ["state", "content", "reset", "state", "content", "done"]
    assert gate.pipeline.calls == 1


# --- settle ---------------------------------------------------------------------------------------


async def test_a_queued_run_is_settled_without_its_pipeline() -> None:
    pipeline = saying(content("x"))
    bench = Bench(pipeline)
    run = await bench.accepted()
    ended = await bench.runner.settle(run, "api", CANCELLED)
    assert ended is not None
    assert ended.state is RunState.CANCELLED
    await bench.check_end(run, EventType.CANCELLED)
    assert pipeline.calls == 0


async def test_a_run_that_somebody_holds_or_that_ended_is_not_settled() -> None:
    bench = Bench(saying())
    held = await bench.accepted()
    await bench.log.claim(held, "other")
    assert await bench.runner.settle(held, "api", CANCELLED) is None
    over = await bench.accepted()
    await bench.runner.execute(over, "w")
    assert await bench.runner.settle(over, "api", CANCELLED) is None


async def test_a_settle_says_when_the_log_is_away() -> None:
    bench = Bench(saying())
    run = await bench.accepted()
    bench.log.away = True
    with pytest.raises(LogUnavailable):
        await bench.runner.settle(run, "api", CANCELLED)


# --- gathering ------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(), max_size=30)
_EVENTS = st.lists(
    st.one_of(
        _TEXT.map(content),
        _TEXT.map(reasoning),
        st.just(log("note")),
        st.just(progress("step", 0.5)),
        st.floats(0, 0.004).map(lambda seconds: seconds),
    ),
    max_size=60,
)


def shape(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Types and texts, with neighbouring text of one type joined: what gathering must leave alone."""
    joined: list[tuple[str, str]] = []
    for event in events:
        text = str(event.data.get("text", ""))
        if "text" in event.data and not text:
            continue
        if joined and "text" in event.data and joined[-1][0] == event.type:
            joined[-1] = (event.type, joined[-1][1] + text)
        else:
            joined.append((event.type, text))
    return joined


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(steps=_EVENTS, flush_ms=st.sampled_from([0, 1, 3]))
async def test_gathering_changes_neither_text_nor_order(steps: list[Event | float], flush_ms: float) -> None:
    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        for step in steps:
            if isinstance(step, Event):
                yield step
            else:
                await asyncio.sleep(step)

    bench = Bench(ScriptedPipeline(script), flush_ms=flush_ms)
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    given_events = [
        Event(step.type, {"text": clean(step.data["text"])}) if "text" in step.data else step
        for step in steps
        if isinstance(step, Event)
    ]
    assert shape([event for event in events if event.type != "state" and not event.terminal]) == shape(given_events)


def clean(text: str) -> str:
    return "".join("\ufffd" if char == "\0" or "\ud800" <= char <= "\udfff" else char for char in text)


async def test_halves_of_a_character_that_come_together_are_joined() -> None:
    bench = Bench(saying(content("\ud83c\udf0a")))
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    assert Transcript.of(await bench.events(run)).content == "🌊"


async def test_a_burst_is_written_in_few_bounded_events() -> None:
    bench = Bench(saying(*[content("x" * 10) for _ in range(5_000)]), flush_ms=5)
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    texts = [event.data["text"] for event in events if event.type is EventType.CONTENT]
    assert "".join(texts) == "x" * 50_000
    assert len(texts) < 50
    assert max(map(len, texts)) <= MAX_TEXT + 10


async def test_the_first_text_is_written_before_the_pipeline_goes_on() -> None:
    gate = Gate([content("first")], [content(" second")])
    # Far longer than the test: only the first text may go out before a pause.
    bench = Bench(gate.pipeline, flush_ms=60_000)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "first")
    gate.open.set()
    await task
    await bench.check_end(run, EventType.DONE)


async def test_later_text_is_gathered() -> None:
    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        for word in ("first", " second", " third", " fourth"):
            yield content(word)
            await asyncio.sleep(0.005)

    bench = Bench(ScriptedPipeline(script), flush_ms=60_000)
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.DONE)
    texts = [event.data["text"] for event in events if event.type is EventType.CONTENT]
    assert texts == ["first", " second third fourth"]


async def test_an_endless_answer_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.runner.writer.MAX_LOG", 50_000)

    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        while True:
            yield content("x" * 1_000)

    bench = Bench(ScriptedPipeline(script))
    run = await bench.accepted()
    await bench.runner.execute(run, "w")
    events = await bench.check_end(run, EventType.ERROR)
    assert events[-1].data["code"] == "output_too_large"
    assert sum(len(event.encode()) for event in events) < 100_000


async def test_a_log_that_is_away_bounds_what_is_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.runner.writer.MAX_WAITING_AWAY", 20_000)
    begin = asyncio.Event()
    given_out = 0

    async def script(run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        nonlocal given_out
        yield content("a")
        await begin.wait()
        for _ in range(200):
            given_out += 1
            yield content("x" * 1_000)

    bench = Bench(ScriptedPipeline(script), flush_ms=0)
    run = await bench.accepted()
    task = asyncio.create_task(bench.runner.execute(run, "w"))
    await in_log(bench, run, "a")
    tries, bench.log.away = bench.log.tries, True
    begin.set()
    await eventually(lambda: bench.log.tries > tries + 3)
    # One batch under way, and what may wait behind it.
    assert 20 <= given_out <= 60
    bench.log.away = False
    await task
    events = await bench.check_end(run, EventType.DONE)
    assert Transcript.of(events).content == "a" + "x" * 200_000


async def test_every_claim_and_end_is_counted() -> None:
    bench = Bench(saying(content("x")))
    await bench.runner.execute(await bench.accepted(), "w")
    assert ("headwater_runs_claimed_total", {"kind": "scripted"}) in bench.counted
    assert ("headwater_runs_ended_total", {"kind": "scripted", "state": "done", "code": ""}) in bench.counted
    assert ("headwater_first_token_seconds", {"kind": "scripted"}) in bench.counted
    row, message = bench.rows()["run"], bench.rows()["message"]
    assert isinstance(message, Message)
    assert message.status is MessageStatus.DONE
    assert isinstance(row, Run)
