"""One polled page: what it says of a log that is not the one the caller's cursor belongs to."""

from __future__ import annotations

from typing import Any, cast

from headwater.access import LOCAL_OWNER, Caller
from headwater.events import Cursor, content, done
from headwater.streams.base import Page
from headwater.telemetry import Telemetry
from headwater.transports.base import Streams
from headwater.transports.poll import Poll, Polled

OLD = Cursor("e1", 2)


def a_page(epoch: str, count: int, *, closed: bool = False) -> Page:
    events = [content(str(seq)).stamped(seq, 1) for seq in range(1, count + 1)]
    if closed:
        events[-1] = done().stamped(count, 1)
    return Page(epoch, events, count, closed)


async def ask(after: Cursor | None, *logs: Page | None) -> Polled:
    """Poll once without waiting; each read meets the next of `logs`."""
    left = list(logs)

    async def read(run_id: str, after: int, limit: int) -> Page | None:
        log = left.pop(0)
        return log and Page(
            log.epoch, [event for event in log.events if event.seq > after][:limit], log.count, log.closed
        )

    async def may(caller: Caller, run_id: str) -> None:
        """Everything."""

    poll = Poll(cast("Any", None), Streams(limit=1, telemetry=Telemetry()), may=may, read=read)
    return await poll.events(Caller(LOCAL_OWNER), "r", after, 0, 100)


async def test_another_log_means_reset_and_everything_from_the_start() -> None:
    log = a_page("e2", 4, closed=True)
    answer = await ask(OLD, log, log)
    assert [event.seq for event in answer.events] == [1, 2, 3, 4]
    assert (answer.reset, answer.done, answer.cursor) == (True, True, Cursor("e2", 4))


async def test_a_log_that_is_shorter_than_what_was_shown_is_another_log() -> None:
    log = a_page("e1", 1)
    assert (await ask(OLD, log, log)).reset


async def test_where_nothing_was_shown_any_log_will_do() -> None:
    answer = await ask(Cursor("e1", 0), a_page("e2", 2))
    assert (answer.reset, len(answer.events), answer.cursor) == (False, 2, Cursor("e2", 2))


async def test_what_is_shown_stays_while_there_is_nothing_to_show_instead() -> None:
    empty = a_page("e2", 0)
    waits = Polled((), OLD, reset=False, done=False)
    assert await ask(OLD, None) == waits
    assert await ask(OLD, empty, empty) == waits
    # It vanished between the two looks: a part of it would leave a hole.
    assert await ask(OLD, a_page("e2", 4), None) == waits
