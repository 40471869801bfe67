from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from headwater.errors import SettingsError
from headwater.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the machine and no `.env` reaches these tests."""
    for field in Settings.model_fields.values():
        if field.alias:
            monkeypatch.delenv(field.alias, raising=False)
    monkeypatch.chdir(tmp_path)


def test_without_any_variable_the_demo_answers_on_loopback() -> None:
    settings = load_settings()
    assert settings.demo
    assert settings.loopback
    assert settings.port == 5000
    settings.check_exposed()


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "OPENAI_BASE_URL"])
def test_a_key_or_a_base_url_ends_the_demo(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9/v1")
    assert not load_settings().demo


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setenv("PORT", "")
    assert load_settings().demo
    assert load_settings().port == 5000


def test_a_dotenv_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=6000\nOPENAI_MODEL=from-file\nUNKNOWN=1\n")
    monkeypatch.setenv("PORT", "7000")
    settings = load_settings()
    assert (settings.port, settings.openai_model) == (7000, "from-file")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_another_host_than_loopback_needs_a_token(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("HOST", host)
    with pytest.raises(SettingsError, match="HEADWATER_ACCESS_TOKEN"):
        load_settings().check_exposed()
    monkeypatch.setenv("HEADWATER_ACCESS_TOKEN", "0123456789abcdef")
    load_settings().check_exposed()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("HOST", host)
    load_settings().check_exposed()


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "70000"), ("PORT", "x"), ("OPENAI_TEMPERATURE", "3"), ("HEADWATER_ACCESS_TOKEN", "short")],
)
def test_a_bad_value_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name) as error:
        load_settings()
    if name == "HEADWATER_ACCESS_TOKEN":
        assert value not in str(error.value)


def test_a_failpoint_needs_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_FAILPOINT", "accept.journalled")
    with pytest.raises(SettingsError, match="DEBUG"):
        load_settings()
    monkeypatch.setenv("DEBUG", "1")
    assert load_settings().failpoint == "accept.journalled"


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HEADWATER_ACCESS_TOKEN", "DATABASE_URL"):
        monkeypatch.setenv(name, "postgresql://very-secret-value")
    monkeypatch.setenv("REDIS_URL", "redis://:very-secret-value@127.0.0.1:6379/0")
    assert "very-secret" not in repr(load_settings())


def test_what_is_missing_says_what_to_do() -> None:
    with pytest.raises(SettingsError, match="headwater up"):
        load_settings().need_redis()
    with pytest.raises(SettingsError, match="headwater up"):
        load_settings().need_database()


@pytest.mark.parametrize(
    "url", ["foo", "memory://hush", "http://hush@h", "redis://:hu/sh@h:1", "redis://:hush@h:port", "amqp://hush@h"]
)
def test_an_address_that_is_not_of_redis_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(SettingsError, match=r"REDIS_URL.*redis://, rediss:// or unix://") as error:
        load_settings()
    assert "hush" not in str(error.value)
    with pytest.raises(ValidationError) as raw:
        Settings()
    assert "hush" not in str(raw.value)


@pytest.mark.parametrize("url", ["redis://h", "rediss://u:p%2F@h:6380/1", "unix:///run/redis.sock"])
def test_addresses_of_redis_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    assert load_settings().need_redis() == url


@pytest.mark.parametrize("url", ["foo:hush", "mysql://u:hush@h/d", "postgresql:/u:hush@h", "postgres+hush"])
def test_an_address_that_is_not_of_postgresql_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(SettingsError, match=r"DATABASE_URL.*postgresql://user") as error:
        load_settings()
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("url", ["postgresql:///d?host=/run", "postgres://h", "postgresql+psycopg://u:p@a:1,b:2/d"])
def test_addresses_of_postgresql_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    assert load_settings().need_database() == url


def test_a_secret_that_comes_with_a_line_break_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADWATER_ACCESS_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "0123456789abcdef\n")
    monkeypatch.setenv("DATABASE_URL", "postgresql://user@host/db\n")
    settings = load_settings()
    assert settings.need_database() == "postgresql://user@host/db"
    assert settings.access_token is not None
    assert settings.openai_api_key is not None
    assert settings.access_token.get_secret_value() == settings.openai_api_key.get_secret_value() == "0123456789abcdef"
    monkeypatch.setenv("HEADWATER_ACCESS_TOKEN", "too short" + " " * 16)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).splitlines()[1].startswith("  HEADWATER_ACCESS_TOKEN: needs 16 characters or more")


def test_a_file_of_settings_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"OPENAI_MODEL=caf\xe9\n")
    with pytest.raises(SettingsError, match=f"The file {tmp_path / '.env'} cannot be read: "):
        load_settings()


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_seconds_have_an_end(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HEADWATER_DB_WAIT", value)
    with pytest.raises(SettingsError, match="HEADWATER_DB_WAIT"):
        load_settings()
