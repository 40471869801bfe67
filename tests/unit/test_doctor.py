"""What the doctor makes of what it sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headwater.access import Access
from headwater.clock import FrozenClock
from headwater.doctor import (
    Finding,
    Verdict,
    check_clock,
    check_folder,
    check_postgres,
    check_redis,
    check_settings,
    check_versions,
    examine,
    numbers,
)
from headwater.errors import Forbidden
from headwater.settings import Settings, load_settings
from headwater.store.probe import PostgresFacts
from headwater.streams.probe import RedisFacts

REDIS = RedisFacts(
    version="9.0.1",
    policy="noeviction",
    used_memory=2_000_000,
    append_only=True,
    round_trip=0.0003,
    now_ms=0,
)
POSTGRES = PostgresFacts(version="18.1", read_only=False, round_trip=0.0004, now_ms=0, max_connections=200)
TOKEN = "0123456789abcdef"


def verdicts(findings: list[Finding]) -> list[Verdict]:
    return [finding.verdict for finding in findings]


def settings(**values: object) -> Settings:
    return load_settings(_env_file=None, **values)


def test_a_redis_as_it_should_be_is_one_good_line() -> None:
    assert verdicts(check_redis(REDIS)) == [Verdict.GOOD]


@pytest.mark.parametrize(
    ("facts", "verdict", "word"),
    [
        (replace(REDIS, policy="allkeys-lru"), Verdict.BAD, "allkeys-lru"),
        (replace(REDIS, version="5.0.14"), Verdict.BAD, "5.0.14"),
        (replace(REDIS, round_trip=0.2), Verdict.WARN, "200.0 ms"),
        (replace(REDIS, append_only=False), Verdict.WARN, "append-only"),
        (replace(REDIS, refused="headwater:due: no permissions"), Verdict.BAD, "headwater:due"),
    ],
)
def test_what_is_wrong_with_redis_is_said_with_what_to_do(facts: RedisFacts, verdict: Verdict, word: str) -> None:
    [finding] = check_redis(facts)
    assert finding.verdict is verdict
    assert word in finding.text
    assert finding.advice


def test_two_faults_are_two_lines() -> None:
    assert len(check_redis(replace(REDIS, policy="volatile-ttl", append_only=False))) == 2


def test_a_postgres_as_it_should_be_is_one_good_line() -> None:
    assert verdicts(check_postgres(POSTGRES, "0003", "0003")) == [Verdict.GOOD]


@pytest.mark.parametrize(
    ("facts", "current", "verdict", "word"),
    [
        (POSTGRES, None, Verdict.BAD, "missing"),
        (POSTGRES, "0002", Verdict.BAD, "0002"),
        (replace(POSTGRES, version="12.4"), "0003", Verdict.BAD, "12.4"),
        (replace(POSTGRES, read_only=True), "0003", Verdict.BAD, "no writes"),
        (replace(POSTGRES, round_trip=0.2), "0003", Verdict.WARN, "200.0 ms"),
    ],
)
def test_what_is_wrong_with_postgres_is_said_with_what_to_do(
    facts: PostgresFacts, current: str | None, verdict: Verdict, word: str
) -> None:
    [finding] = check_postgres(facts, current, "0003")
    assert finding.verdict is verdict
    assert word in finding.text
    assert finding.advice


def test_clocks_that_differ_by_more_than_two_seconds_are_said() -> None:
    assert check_clock({"Redis": 40, "PostgreSQL": -1900}).verdict is Verdict.GOOD
    assert check_clock({"Redis": 40, "PostgreSQL": -2100}).verdict is Verdict.WARN
    assert "-2100 ms" in check_clock({"Redis": 40, "PostgreSQL": -2100}).text


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({}, Verdict.GOOD),
        ({"host": "0.0.0.0"}, Verdict.BAD),
        ({"host": "0.0.0.0", "access_token": TOKEN}, Verdict.GOOD),
        ({"host": "0.0.0.0", "access_token": TOKEN, "debug": True}, Verdict.WARN),
        ({"debug": True}, Verdict.GOOD),
        ({"allowed_hosts": "*"}, Verdict.WARN),
        ({"openai_api_key": "k", "openai_base_url": "http://models.example.com/v1"}, Verdict.WARN),
        ({"openai_api_key": "k", "openai_base_url": "http://127.0.0.1:9/v1"}, Verdict.GOOD),
        ({"openai_api_key": "k", "openai_base_url": "https://models.example.com/v1"}, Verdict.GOOD),
    ],
)
def test_settings_that_expose_something_are_said(values: dict[str, object], verdict: Verdict) -> None:
    assert verdicts(check_settings(settings(**values))) == [verdict]


def test_a_star_among_the_hosts_is_no_wildcard() -> None:
    given = settings(allowed_hosts="*")
    with pytest.raises(Forbidden):
        Access(given).authenticate([(b"host", b"any.example")], method="GET", scheme="http", path="/")
    assert "allows nothing" in check_settings(given)[0].text


def test_this_python_and_its_packages_will_do() -> None:
    assert check_versions().verdict is Verdict.GOOD


def test_a_folder_that_takes_a_file_is_good_and_left_as_it_was(tmp_path: Path) -> None:
    assert check_folder(tmp_path).verdict is Verdict.GOOD
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "a" / "b").verdict is Verdict.GOOD
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_broken(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    for folder in (tmp_path / "data", tmp_path / "data" / "below"):
        finding = check_folder(folder)
        assert finding.verdict is Verdict.BAD
        assert finding.advice


async def test_servers_that_do_not_answer_become_findings_and_stop_no_other_check(tmp_path: Path) -> None:
    given = settings(
        redis_url="redis://127.0.0.1:1/0", database_url="postgresql://u:pw@127.0.0.1:1/x", data_dir=tmp_path
    )
    findings = await examine(given, clock=FrozenClock())
    by_name = {finding.name: finding for finding in findings}
    assert by_name["Redis"].verdict is by_name["PostgreSQL"].verdict is Verdict.BAD
    assert by_name["Model"].verdict is Verdict.WARN
    assert "Clock" not in by_name
    assert not any("pw" in finding.text for finding in findings)
    # Who reads it has just run it.
    assert not any("headwater doctor" in finding.advice for finding in findings)


async def test_without_urls_it_says_which_setting_is_missing(tmp_path: Path) -> None:
    findings = await examine(settings(data_dir=tmp_path), clock=FrozenClock())
    broken = [finding.text for finding in findings if finding.verdict is Verdict.BAD]
    assert any("REDIS_URL" in text for text in broken)
    assert any("DATABASE_URL" in text for text in broken)


@pytest.mark.parametrize(
    ("text", "parts"), [("7.2.4", (7, 2, 4)), ("18.1 (Debian 18.1-1)", (18, 1)), ("9.0-rc1", (9, 0)), ("devel", ())]
)
def test_versions_are_read_as_numbers(text: str, parts: tuple[int, ...]) -> None:
    assert numbers(text) == parts


async def test_a_check_that_breaks_in_an_unknown_way_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: str) -> RedisFacts:
        raise RuntimeError("redis://:hush@h")

    monkeypatch.setattr("headwater.doctor.redis_facts", broken)
    findings = await examine(
        settings(redis_url="redis://127.0.0.1:1", database_url="postgresql://127.0.0.1:1/x", data_dir=tmp_path),
        clock=FrozenClock(),
    )
    by_name = {finding.name: finding for finding in findings}
    assert by_name["Redis"].verdict is Verdict.BAD
    assert "RuntimeError" in by_name["Redis"].text
    assert "hush" not in by_name["Redis"].text
    assert "Model" in by_name
