"""compose.yaml, Dockerfile and .env.example, as far as reading them can tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from headwater.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "HEADWATER_ACCESS_TOKEN"}
OURS = ("server", "worker", "beat", "migrate")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


def text() -> str:
    return (ROOT / "compose.yaml").read_text()


def example() -> dict[str, str]:
    lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("# ")]
    pairs = (line.removeprefix("#").partition("=") for line in lines if re.match(r"#?[A-Z_]+=", line))
    return {name: value for name, _, value in pairs}


def test_every_part_is_a_service(services: dict[str, Any]) -> None:
    assert set(services) == {"server", "worker", "beat", "migrate", "redis", "postgres"}


def test_the_secrets_are_required_and_have_no_default() -> None:
    uses = re.findall(r"\$\{([A-Z_]+)(:?[-?])?[^}]*\}", text())
    for name, operator in uses:
        assert (operator == ":?") == (name in SECRETS), f"{name}{operator}"
    assert {name for name, _ in uses} >= SECRETS


def test_every_variable_is_a_setting_or_explained_in_the_example() -> None:
    known = {field.alias for field in Settings.model_fields.values()} | set(example())
    assert {name for name, _ in re.findall(r"\$\{([A-Z_]+)([^}]*)\}", text())} <= known


def test_what_our_containers_get_is_a_setting(services: dict[str, Any]) -> None:
    known = {field.alias for field in Settings.model_fields.values()}
    for name in OURS:
        assert set(services[name]["environment"]) <= known, name


def test_only_the_server_is_published_and_on_loopback_unless_told_otherwise(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(published) == ["server"]
    assert published["server"] == ["${PUBLISH:-127.0.0.1:5000}:5000"]


def test_the_server_binds_every_address_inside_and_needs_the_token(services: dict[str, Any]) -> None:
    environment = services["server"]["environment"]
    assert environment["HOST"] == "0.0.0.0"
    assert environment["HEADWATER_ACCESS_TOKEN"].startswith("${HEADWATER_ACCESS_TOKEN:?")


def test_redis_evicts_nothing_keeps_a_file_and_has_a_password(services: dict[str, Any]) -> None:
    command = " ".join(services["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command
    assert '--requirepass "$$REDIS_PASSWORD"' in command


def test_what_can_answer_has_a_health_check_and_the_rest_says_that_it_has_none(services: dict[str, Any]) -> None:
    without = {name for name, service in services.items() if service["healthcheck"].get("disable")}
    assert without == {"beat", "migrate"}
    assert all(services[name]["healthcheck"]["test"] for name in set(services) - without)


def test_the_programs_wait_for_the_schema_and_for_redis(services: dict[str, Any]) -> None:
    for name in ("server", "worker", "beat"):
        waits = services[name]["depends_on"]
        assert waits["migrate"]["condition"] == "service_completed_successfully"
        assert waits["redis"]["condition"] == "service_healthy"
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert services["migrate"]["restart"] == "no"


def test_data_stands_in_named_volumes(compose: dict[str, Any], services: dict[str, Any]) -> None:
    used = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert used == set(compose["volumes"]) == {"data", "redis", "postgres"}


def test_the_databases_are_on_a_network_that_leads_nowhere(compose: dict[str, Any], services: dict[str, Any]) -> None:
    assert compose["networks"]["inside"]["internal"] is True
    assert services["redis"]["networks"] == services["postgres"]["networks"] == ["inside"]


def test_our_containers_cannot_write_their_image_nor_gain_rights(services: dict[str, Any]) -> None:
    for name in OURS:
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]


def test_the_example_holds_no_live_secret() -> None:
    values = example()
    assert {name for name in SECRETS | {"OPENAI_API_KEY"} if values[name] != ""} == set()


def test_the_image_runs_as_a_plain_user_from_the_lock() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER headwater"]
    assert lines.index("USER headwater") < lines.index('ENTRYPOINT ["headwater"]')
    syncs = [line for line in lines if "uv sync" in line]
    assert syncs
    assert all("--frozen" in line and "--no-dev" in line for line in syncs)
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    assert lines.count("FROM python:${PYTHON}-slim AS build") == lines.count("FROM python:${PYTHON}-slim") == 1


def test_the_image_takes_only_what_it_is_built_from() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in kept)
