"""Monitors: what passes through Redis and Celery, as lines a person can read."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from headwater.clock import Clock, to_datetime
from headwater.events import EventType
from headwater.queue import make_celery
from headwater.runs import RunState
from headwater.settings import Settings
from headwater.streams.watch import Published, metadata, published, recent

Say = Callable[[str], object]

#: Characters of text shown of one message.
EXCERPT: Final = 60
#: Runs shown by `list`.
LATEST: Final = 20
#: Seconds to wait for the workers' answers.
PATIENCE: Final = 1.0
#: Seconds between two looks at a task.
INTERVAL: Final = 0.5
#: Celery's states that end a task.
_ENDED: Final = frozenset({"SUCCESS", "FAILURE", "REVOKED"})


async def watch_redis(url: str, pattern: str, *, clock: Clock, say: Say) -> None:
    """Write a line for each message published on a channel that matches, for ever.

    Raises LogUnavailable when Redis cannot be reached at the start; later it waits.
    """
    stood = False
    async for message in published(url, pattern):
        if message is not None:
            say(f"{_time(clock)}  {describe(message)}")
        else:
            say(f"{_time(clock)}  following {pattern}{', again; something may have been missed' if stood else ''}")
            stood = True


def describe(message: Published) -> str:
    """One message as a line: channel, count and types of the events, the beginning of their text."""
    if message.epoch is None:
        return f"{message.channel}  {excerpt(message.raw.decode(errors='replace'))}"
    types = Counter(event.type for event in message.events)
    kinds = ", ".join(f"{count} {kind.value}" if count > 1 else kind.value for kind, count in types.items())
    last = message.first_seq + len(message.events) - 1
    seqs = f"{message.first_seq}" if last <= message.first_seq else f"{message.first_seq}–{last}"
    texts = [
        str(event.data.get("text") or event.data.get("message") or event.data.get("state") or "")
        for event in message.events
    ]
    separator = "" if set(types) <= {EventType.CONTENT, EventType.REASONING} else " "
    text = excerpt(separator.join(part for part in texts if part))
    return f"{message.channel}  {message.epoch} {seqs}  {kinds}{f'  {text}' if text else ''}"


def excerpt(text: str) -> str:
    """The beginning of a text on one line, without control characters that could play with the terminal."""
    plain = "".join(" " if char in "\r\n\t" else char for char in text if char in "\r\n\t" or char.isprintable())
    return plain if len(plain) <= EXCERPT else f"{plain[: EXCERPT - 1]}…"


async def list_celery(settings: Settings, *, clock: Clock, say: Say) -> None:
    """Write the workers, what they run and hold, and the latest runs."""
    # First, as it says in a sentence that Redis is away; Celery would say it in its own words.
    runs = await recent(settings.need_redis(), LATEST)
    celery = make_celery(settings)
    # The three ask one after the other and each waits for PATIENCE, so they ask at the same time instead.
    stats, active, reserved = await asyncio.gather(
        *(
            asyncio.to_thread(getattr(celery.control.inspect(timeout=PATIENCE), ask))
            for ask in ("stats", "active", "reserved")
        )
    )
    say("Workers")
    for name, facts in sorted((stats or {}).items()):
        pool = facts.get("pool", {})
        say(f"  {name}  pid {facts.get('pid')}, {pool.get('max-concurrency', '?')} at once")
    if not stats:
        say("  none answers. Start one: headwater worker")
    for title, tasks in (("Running", active), ("Held, not begun", reserved)):
        say(title)
        rows = [(name, task) for name, of_worker in sorted((tasks or {}).items()) for task in of_worker]
        for name, task in rows:
            say(f"  {task.get('id')}  {task.get('name')}  on {name}")
        if not rows:
            say("  nothing")
    say("Latest runs")
    for run_id, fields in runs:
        say(f"  {run_id}  {run_line(fields, clock)}")
    if not runs:
        say("  none in Redis")


async def watch_task(settings: Settings, task_id: str, *, clock: Clock, say: Say) -> bool:
    """Write a line at each change of a run or task until it ends. Returns whether it ended well."""
    celery = make_celery(settings)
    url = settings.need_redis()
    shown = ""
    while True:
        fields = await metadata(url, task_id)
        state = str(await asyncio.to_thread(lambda: celery.AsyncResult(task_id).state))
        if not fields and state == "PENDING":
            # Celery says PENDING of every id it never heard of.
            say(
                f"{_time(clock)}  {task_id} is unknown: never sent, or forgotten {settings.stream_ttl} s after its end."
            )
            return False
        line = f"{run_line(fields, clock) if fields else 'not a run'}  Celery: {state}"
        changed = f"{fields.get('status')} {fields.get('attempt')} {fields.get('chunk_count')} {state}"
        if changed != shown:
            say(f"{_time(clock)}  {line}")
            shown = changed
        status = fields.get("status")
        if status and RunState(status).terminal:
            return status == RunState.DONE
        if not fields and state in _ENDED:
            return state == "SUCCESS"
        await asyncio.sleep(INTERVAL)


def run_line(fields: Mapping[str, Any], clock: Clock) -> str:
    """A run's metadata as words: state, kind, attempt, events, age of the last change."""
    words = [str(fields.get("status") or "?"), str(fields.get("kind") or "?")]
    if int(fields.get("attempt") or 0) > 1:
        words.append(f"attempt {fields['attempt']}")
    words.append(f"{fields.get('chunk_count') or 0} events")
    if fields.get("cancel") not in {None, "", "0"}:
        words.append("cancel asked for")
    if fields.get("updated_at"):
        words.append(f"{max(0, clock.now_ms() - int(fields['updated_at'])) / 1000:.0f} s ago")
    return ", ".join(words)


def _time(clock: Clock) -> str:
    return to_datetime(clock.now_ms()).astimezone().strftime("%H:%M:%S")
