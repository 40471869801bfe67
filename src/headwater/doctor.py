"""Doctor: looks at everything headwater needs and says what to do where something is wrong.

Each check is on its own: one that fails, for whatever reason, becomes a finding and stops no other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Final

from headwater.clock import Clock
from headwater.errors import HeadwaterError, StoreUnavailable
from headwater.journal import Journal
from headwater.journal.file import OLDEST_SQLITE, apsw_version
from headwater.providers import connect
from headwater.settings import Settings
from headwater.store import migrate
from headwater.store.probe import PostgresFacts, postgres_facts
from headwater.streams.probe import RedisFacts, redis_facts
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds one check may take.
PATIENCE: Final = 15.0
#: Milliseconds two clocks may differ before it is said.
SKEW: Final = 2000
#: Bytes that should be free where the journal lives.
ROOM: Final = 500_000_000
#: A round trip longer than so many seconds slows every token.
SLOW: Final = 0.05
#: The oldest servers this is made for.
OLDEST_REDIS: Final = (6, 2)
OLDEST_POSTGRES: Final = (14,)
OLDEST_PYTHON: Final = (3, 11)


class Verdict(StrEnum):
    """How a check came out; the value is its mark."""

    GOOD = "✔"
    WARN = "!"
    BAD = "✘"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    verdict: Verdict
    text: str
    #: What to do; empty when there is nothing to do.
    advice: str = ""


async def examine(settings: Settings, *, clock: Clock, running: str | None = None) -> list[Finding]:
    """Every check, in the order of the report. `running`: where a `headwater up` on the data folder answers."""
    findings = [check_versions(), *check_settings(settings, running)]
    clocks: dict[str, int] = {}
    findings += await _guarded("Redis", lambda: _redis(settings, clocks, clock))
    findings += await _guarded("PostgreSQL", lambda: _postgres(settings, clocks, clock))
    findings += [check_clock(clocks)] if clocks else []
    findings += await _guarded("Journal", lambda: _journal(settings, clock))
    findings += await _guarded("Model", lambda: _provider(settings))
    return findings


async def _guarded(name: str, check: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    try:
        async with asyncio.timeout(PATIENCE):
            return await check()
    except HeadwaterError as error:
        advice = "Is it running, and does DATABASE_URL name it?" if isinstance(error, StoreUnavailable) else ""
        return [Finding(name, Verdict.BAD, str(error), advice)]
    except TimeoutError:
        return [Finding(name, Verdict.BAD, f"no answer in {PATIENCE:g} s", "Is it stopped, or is a firewall between?")]
    except Exception as error:
        # Whatever it is, the other checks are still worth having.
        logger.debug("the check of %s failed", name, exc_info=True)
        text = f"the check itself failed: {type(error).__name__}"
        return [Finding(name, Verdict.BAD, text, "DEBUG=1 logs where.")]


def check_versions() -> Finding:
    """Python and the packages."""
    text = f"headwater {version('headwater')}, Python {sys.version.split()[0]}, " + ", ".join(
        f"{name} {version(name)}" for name in ("celery", "redis", "psycopg", "sqlalchemy", "fastapi", "uvicorn")
    )
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("Versions", Verdict.BAD, text, f"Use Python {dotted(OLDEST_PYTHON)} or newer.")
    return Finding("Versions", Verdict.GOOD, text)


def check_settings(settings: Settings, running: str | None = None) -> list[Finding]:
    """Combinations that expose or lose something."""
    findings = []
    try:
        settings.check_exposed()
    except HeadwaterError as error:
        findings.append(Finding("Settings", Verdict.BAD, str(error)))
    if not settings.loopback and settings.debug:
        findings.append(
            Finding("Settings", Verdict.WARN, f"DEBUG is on while HOST={settings.host} is public", "Unset DEBUG.")
        )
    if settings.allowed_hosts and "*" in settings.allowed_hosts:
        findings.append(
            Finding(
                "Settings",
                Verdict.WARN,
                "HEADWATER_ALLOWED_HOSTS has *, which is no wildcard and allows nothing",
                "Name the hosts.",
            )
        )
    base = settings.openai_base_url or ""
    if settings.openai_api_key is not None and base.startswith("http://") and not _local(base):
        findings.append(
            Finding("Settings", Verdict.WARN, f"OPENAI_API_KEY goes unencrypted to {base}", "Use an https:// address.")
        )
    place = f"`headwater up` answers at {running}" if running else f"binds {settings.host}:{settings.port}"
    return findings or [Finding("Settings", Verdict.GOOD, f"{place}, {_lock(settings)}")]


def _lock(settings: Settings) -> str:
    return "needs the access token" if settings.access_token else "for this machine only, no sign-in"


def _local(url: str) -> bool:
    host = url.removeprefix("http://").split("/")[0].rsplit(":", 1)[0]
    return host in {"localhost", "127.0.0.1", "[::1]", "host.docker.internal"} or "." not in host


async def _redis(settings: Settings, clocks: dict[str, int], clock: Clock) -> list[Finding]:
    facts = await redis_facts(settings.need_redis())
    clocks["Redis"] = facts.now_ms - clock.now_ms()
    return check_redis(facts)


def check_redis(facts: RedisFacts) -> list[Finding]:
    """Version, what happens when its memory is full, speed, durability."""
    text = f"version {facts.version}, {facts.round_trip * 1000:.1f} ms, {facts.used_memory / 1e6:.0f} MB used"
    findings = []
    if numbers(facts.version) < OLDEST_REDIS:
        findings.append(Finding("Redis", Verdict.BAD, text, f"Use Redis {dotted(OLDEST_REDIS)} or newer, or Valkey."))
    if facts.refused:
        advice = (
            "Let REDIS_URL's user run scripts and use every key and channel; delete a key that something else wrote."
        )
        findings.append(Finding("Redis", Verdict.BAD, f"refuses the use of {facts.refused}", advice))
    if facts.policy != "noeviction":
        findings.append(
            Finding(
                "Redis",
                Verdict.BAD,
                f"maxmemory-policy is {facts.policy}: when its memory is full it drops queued runs and open streams",
                "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in its configuration file.",
            )
        )
    if facts.round_trip > SLOW:
        findings.append(Finding("Redis", Verdict.WARN, text, "Every token waits for it: put it nearer."))
    if not facts.append_only:
        findings.append(
            Finding(
                "Redis",
                Verdict.WARN,
                "keeps no append-only file: its restart makes running answers begin again",
                "redis-cli CONFIG SET appendonly yes, and the same in its configuration file.",
            )
        )
    return findings or [Finding("Redis", Verdict.GOOD, f"{text}, noeviction, append-only file")]


async def _postgres(settings: Settings, clocks: dict[str, int], clock: Clock) -> list[Finding]:
    url = settings.need_database()
    facts = await asyncio.to_thread(postgres_facts, url)
    clocks["PostgreSQL"] = facts.now_ms - clock.now_ms()
    current = await asyncio.to_thread(migrate.current, url)
    return check_postgres(facts, current, migrate.head())


def check_postgres(facts: PostgresFacts, current: str | None, head: str) -> list[Finding]:
    """Version, writability, speed, schema."""
    text = f"version {facts.version}, {facts.round_trip * 1000:.1f} ms, schema {current or 'missing'}"
    findings = []
    if numbers(facts.version)[:1] < OLDEST_POSTGRES:
        findings.append(Finding("PostgreSQL", Verdict.BAD, text, f"Use PostgreSQL {dotted(OLDEST_POSTGRES)} or newer."))
    if current != head:
        findings.append(
            Finding(
                "PostgreSQL",
                Verdict.BAD,
                f"schema is {current or 'missing'}, needs {head}",
                "Run `headwater db upgrade`.",
            )
        )
    if facts.read_only:
        findings.append(
            Finding("PostgreSQL", Verdict.BAD, "takes no writes", "DATABASE_URL may name a standby: name the primary.")
        )
    if facts.round_trip > SLOW:
        findings.append(Finding("PostgreSQL", Verdict.WARN, text, "Each message waits for it: put it nearer."))
    return findings or [Finding("PostgreSQL", Verdict.GOOD, text)]


def check_clock(ahead: dict[str, int]) -> Finding:
    """How far the servers' clocks are from ours, in milliseconds."""
    text = ", ".join(f"{name} {skew:+d} ms" for name, skew in ahead.items())
    if max(abs(skew) for skew in ahead.values()) > SKEW:
        return Finding(
            "Clock",
            Verdict.WARN,
            f"{text} from this machine",
            "Leases and orders do not mind; times shown do. Set the clocks by NTP.",
        )
    return Finding("Clock", Verdict.GOOD, f"{text} from this machine")


async def _journal(settings: Settings, clock: Clock) -> list[Finding]:
    path = settings.journal_file
    findings = [check_folder(path.parent)]
    sqlite = apsw_version()
    if sqlite < OLDEST_SQLITE:
        advice = f"Install apsw {dotted(OLDEST_SQLITE)} or newer."
        findings.append(Finding("Journal", Verdict.BAD, f"SQLite {dotted(sqlite)} can damage its file", advice))
    if not path.exists():
        # Opening would make the file, and a look must change nothing.
        return [*findings, Finding("Journal", Verdict.GOOD, f"SQLite {dotted(sqlite)}, no file yet")]
    journal = Journal(path, clock=clock, telemetry=Telemetry())
    await journal.open()
    try:
        backlog = await journal.backlog()
    finally:
        await journal.close()
    text = f"SQLite {dotted(sqlite)}, {backlog.count} records wait for PostgreSQL"
    if backlog.poison:
        advice = "`headwater journal status` has the reasons, `headwater journal retry` brings them back. None is lost."
        findings.append(Finding("Journal", Verdict.WARN, f"{backlog.poison} records are refused by PostgreSQL", advice))
    if backlog.oldest_ms is not None and backlog.oldest_ms > 600_000:
        advice = "Mend PostgreSQL, then `headwater journal sync`."
        text = f"{text}, the oldest for {backlog.oldest_ms // 60_000} minutes"
        return [*findings, Finding("Journal", Verdict.WARN, text, advice)]
    return [*findings, Finding("Journal", Verdict.GOOD, text)]


def check_folder(folder: Path) -> Finding:
    """Whether the journal's folder takes a file and has room."""
    existing = next(part for part in (folder, *folder.parents) if part.exists())
    free = shutil.disk_usage(existing).free
    text = f"{folder}, {free / 1e9:.1f} GB free"
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is no folder")
        if not os.access(existing, os.W_OK):
            raise PermissionError(f"{existing} may not be written")
        if folder.exists():
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"headwater")
                os.fsync(file.fileno())
    except OSError as error:
        advice = "Give it to the user that runs headwater, or set HEADWATER_DATA_DIR."
        return Finding("Journal", Verdict.BAD, f"{folder} cannot be written: {error}", advice)
    if free < ROOM:
        return Finding("Journal", Verdict.WARN, text, "Free some space: a full disk refuses new messages.")
    return Finding("Journal", Verdict.GOOD, text)


async def _provider(settings: Settings) -> list[Finding]:
    provider = connect(settings, Telemetry())
    try:
        sentence = await provider.check()
    finally:
        await provider.close()
    if provider.demo:
        # The demo's own sentence says how to set a model.
        return [Finding("Model", Verdict.WARN, sentence)]
    return [Finding("Model", Verdict.GOOD, sentence)]


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: `7.2.4-rc1` is (7, 2, 4)."""
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def dotted(parts: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in parts)
