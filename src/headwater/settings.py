"""Settings: the only reader of the environment. `docs/reference/settings.md` is made from this class."""

from __future__ import annotations

import ipaddress
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from headwater.errors import SettingsError, reason

#: `memory` is for tests and demonstrations in one process.
_REDIS_SCHEMES: Final = frozenset({"redis", "rediss", "unix"})
_POSTGRES_SCHEMES: Final = frozenset({"postgresql", "postgres"})


class WhenBusy(StrEnum):
    """What becomes of a message that arrives while its chat is answering."""

    #: It is refused with `chat_busy`.
    REJECT = "reject"
    #: It is answered after what came before it.
    ENQUEUE = "enqueue"
    #: What came before it is stopped; then it is answered.
    INTERRUPT = "interrupt"


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "headwater"


class Settings(BaseSettings):
    """Read once, at a composition root, from the environment and `.env`; frozen afterwards."""

    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        env_ignore_empty=True,
        allow_inf_nan=False,
        # A URL may carry a password.
        hide_input_in_errors=True,
    )

    # The model.
    openai_api_key: SecretStr | None = Field(
        None,
        alias="OPENAI_API_KEY",
        description="Key of the model's API. Without one, the built-in demo model answers.",
    )
    openai_base_url: str | None = Field(
        None,
        alias="OPENAI_BASE_URL",
        description="Any OpenAI-compatible API, up to and with `/v1`. Default: OpenAI's own. "
        "Set without a key, it is called without one (local servers).",
    )
    openai_model: str = Field("gpt-4o-mini", alias="OPENAI_MODEL", description="The model's name.")
    openai_max_tokens: int | None = Field(
        1000, alias="OPENAI_MAX_TOKENS", gt=0, description="Longest answer, in tokens."
    )
    openai_temperature: float | None = Field(
        0.7, alias="OPENAI_TEMPERATURE", ge=0, le=2, description="Sampling temperature, 0 to 2."
    )

    # The servers.
    redis_url: str | None = Field(
        None,
        alias="REDIS_URL",
        # It may carry a password.
        repr=False,
        description="Redis for the broker and the logs. Unset: `headwater up` starts its own.",
    )
    database_url: SecretStr | None = Field(
        None, alias="DATABASE_URL", description="PostgreSQL. Unset: `headwater up` starts its own."
    )

    # The web server.
    debug: bool = Field(False, alias="DEBUG", description="Log more, and show tracebacks on the command line.")
    no_color: str | None = Field(None, alias="NO_COLOR", description="When set, the command line uses no colour.")
    host: str = Field(
        "127.0.0.1", alias="HOST", description="Address to bind. Other than loopback needs HEADWATER_ACCESS_TOKEN."
    )
    port: int = Field(5000, alias="PORT", ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        alias="HEADWATER_ALLOWED_HOSTS",
        description="Host names the server answers to, comma separated, besides loopback names and HOST.",
    )
    server_workers: int = Field(
        1,
        alias="HEADWATER_SERVER_WORKERS",
        gt=0,
        description="Processes of the web server on one port; each can use one core.",
    )
    access_token: SecretStr | None = Field(
        None,
        alias="HEADWATER_ACCESS_TOKEN",
        description="When set, every request needs it: as bearer token or by the sign-in page. At least 16 characters.",
    )

    # Our own.
    data_dir: Path = Field(
        default_factory=_default_data_dir,
        alias="HEADWATER_DATA_DIR",
        description="Where the journal and the embedded servers' data live. Default: `~/.local/share/headwater`.",
    )
    journal_path: Path | None = Field(
        None,
        alias="HEADWATER_JOURNAL_PATH",
        description="The journal's file. Default: `journal.db` in the data folder.",
    )
    stream_ttl: int = Field(
        3600, alias="HEADWATER_STREAM_TTL", gt=0, description="Seconds a run's log stays in Redis after its last event."
    )
    compress_over: int = Field(
        4096,
        alias="HEADWATER_COMPRESS_OVER",
        ge=0,
        description="Bytes above which a log is compressed in Redis five minutes after its run ended; 0 for never.",
    )
    lease_seconds: float = Field(
        10.0, alias="HEADWATER_LEASE_SECONDS", ge=1, description="A worker that is silent for so long has lost its run."
    )
    owner_runs: int | None = Field(
        None,
        alias="HEADWATER_OWNER_RUNS",
        gt=0,
        description="Runs of one owner that may be under way at once, chats and jobs counted apart; the others wait. "
        "Unset: any number; owners take turns all the same. Without sign-in there is one owner.",
    )
    queue_grace: float = Field(
        15.0,
        alias="HEADWATER_QUEUE_GRACE",
        gt=0,
        description="Seconds after which a run nobody claimed is enqueued again.",
    )
    max_attempts: int = Field(3, alias="HEADWATER_MAX_ATTEMPTS", ge=1, description="Attempts of a run before it fails.")
    run_deadline: float = Field(
        600.0,
        alias="HEADWATER_RUN_DEADLINE",
        gt=0,
        description="Longest time of one chat answer, in seconds. "
        "The prefork pool kills a process that is not done 120 s later.",
    )
    provider_idle: float = Field(
        60.0, alias="HEADWATER_PROVIDER_IDLE", gt=0, description="Longest silence of the model's API, in seconds."
    )
    provider_retries: int = Field(
        3,
        alias="HEADWATER_PROVIDER_RETRIES",
        ge=0,
        description="Further tries after 429, 5xx or a failed connection, before the first token.",
    )
    flush_ms: float = Field(
        20.0, alias="HEADWATER_FLUSH_MS", ge=0, description="Tokens of one run are gathered for so many milliseconds."
    )
    heartbeat: float = Field(
        15.0, alias="HEADWATER_HEARTBEAT", gt=0, le=15, description="Seconds between signs of life on a quiet stream."
    )
    max_body: int = Field(262_144, alias="HEADWATER_MAX_BODY", gt=0, description="Largest request body, in bytes.")
    max_message: int = Field(32_000, alias="HEADWATER_MAX_MESSAGE", gt=0, description="Longest message, in characters.")
    max_history: int = Field(
        200_000, alias="HEADWATER_MAX_HISTORY", gt=0, description="Characters of earlier messages the model is given."
    )
    when_busy: WhenBusy = Field(
        WhenBusy.REJECT,
        alias="HEADWATER_WHEN_BUSY",
        description="What becomes of a message that arrives while its chat is answering: `reject` (409), `enqueue` "
        "(answered afterwards) or `interrupt` (the answer is stopped first). A request may choose by `when_busy`.",
    )
    max_streams: int = Field(
        200, alias="HEADWATER_MAX_STREAMS", gt=0, description="Open streams per owner and server process."
    )
    worker_pool: Literal["asyncio", "prefork", "threads", "solo"] = Field(
        "asyncio",
        alias="HEADWATER_WORKER_POOL",
        description="Pool of `headwater worker`: asyncio (all runs on one event loop), prefork (a process per run), "
        "threads or solo.",
    )
    worker_concurrency: int | None = Field(
        None,
        alias="HEADWATER_WORKER_CONCURRENCY",
        gt=0,
        description="Runs at once per worker process. Default: 1000; with threads 64; with prefork, where each takes a "
        "process, two per core.",
    )
    worker_processes: int = Field(
        1,
        alias="HEADWATER_WORKER_PROCESSES",
        gt=0,
        description="Processes of `headwater worker` and of `headwater up`'s worker. One takes one core.",
    )
    worker_metrics_port: int = Field(
        0,
        alias="HEADWATER_WORKER_METRICS_PORT",
        ge=0,
        le=65535,
        description="Port at HOST where a worker serves its metrics; 0 is off. Several processes take it and those "
        "after it. Not with prefork. The port asks for no token.",
    )
    db_pool_size: int = Field(
        5, alias="HEADWATER_DB_POOL_SIZE", gt=0, description="PostgreSQL connections per process."
    )
    db_wait: float = Field(
        0.8,
        alias="HEADWATER_DB_WAIT",
        gt=0,
        description="Seconds a request waits for PostgreSQL before going on without.",
    )

    failpoint: str | None = Field(
        None,
        alias="HEADWATER_FAILPOINT",
        description="For tests of recovery, with DEBUG only: the process ends as by SIGKILL at this step, `NAME` or "
        "`NAME:N` for the N-th time. The [steps](metrics.md).",
    )

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("data_dir", "journal_path")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # Child processes and unix sockets need a path that means the same everywhere.
        return value.expanduser().absolute() if value is not None else None

    @field_validator("openai_api_key", "access_token", "redis_url", "database_url", mode="before")
    @classmethod
    def _trimmed(cls, value: Any) -> Any:
        # A secret that comes from a file ends with a line break, which no header and no address has.
        return value.strip() if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _of_redis(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            # Reading the port checks it.
            known = parts.scheme in _REDIS_SCHEMES and (parts.port is None or bool(parts.hostname))
        except ValueError:
            known = False
        if not known:
            # Without the value: it may carry a password.
            raise ValueError(
                "is no address of a Redis server; it begins with redis://, rediss:// or unix://, "
                "e.g. redis://127.0.0.1:6379/0, and special characters of a password are percent-encoded"
            )
        return value

    @field_validator("database_url")
    @classmethod
    def _of_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            scheme, colon, _ = value.get_secret_value().partition("://")
            if not colon or scheme.partition("+")[0] not in _POSTGRES_SCHEMES:
                raise ValueError(
                    "is no address of a PostgreSQL server, the only database that is supported; "
                    "it looks like postgresql://user:password@host/database"
                )
        return value

    @field_validator("access_token")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("needs 16 characters or more; `openssl rand -hex 24` makes one")
        return value

    @model_validator(mode="after")
    def _no_failpoint_in_earnest(self) -> Settings:
        if self.failpoint is not None and not self.debug:
            raise ValueError("HEADWATER_FAILPOINT ends the process on purpose and needs DEBUG=1; unset it")
        return self

    @property
    def journal_file(self) -> Path:
        return self.journal_path or self.data_dir / "journal.db"

    @property
    def concurrency(self) -> int:
        """Runs at once per worker."""
        if self.worker_concurrency is not None:
            return self.worker_concurrency
        return {"asyncio": 1000, "prefork": 2 * (os.cpu_count() or 1), "threads": 64, "solo": 1}[self.worker_pool]

    @property
    def demo(self) -> bool:
        """Whether the built-in demo model answers."""
        return self.openai_api_key is None and self.openai_base_url is None

    @property
    def loopback(self) -> bool:
        """Whether HOST can be reached from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_exposed(self) -> None:
        """Refuse to be reachable from other machines without a token. Raises SettingsError."""
        if not self.loopback and self.access_token is None:
            raise SettingsError(
                f"HOST={self.host} can be reached from other machines, and anybody there could read every chat. "
                "Set HEADWATER_ACCESS_TOKEN (16 characters or more; `openssl rand -hex 24` makes one), "
                "or bind 127.0.0.1."
            )

    def need_redis(self) -> str:
        """REDIS_URL. Raises SettingsError when it is not set."""
        if not self.redis_url:
            raise SettingsError(
                "REDIS_URL is not set. Set it, e.g. redis://127.0.0.1:6379/0, "
                "or run `headwater up`, which starts its own."
            )
        return self.redis_url

    def need_database(self) -> str:
        """DATABASE_URL. Raises SettingsError when it is not set."""
        if self.database_url is None:
            raise SettingsError(
                "DATABASE_URL is not set. Set it, e.g. postgresql://user@127.0.0.1:5432/headwater, "
                "or run `headwater up`, which starts its own."
            )
        return self.database_url.get_secret_value()


def child_environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with `changes`, for a process it starts. None takes a variable out."""
    merged: dict[str, str | None] = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def load_settings(**overrides: Any) -> Settings:
    """Read the environment and `.env`. Raises SettingsError that names the variable."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        # What is wrong with several settings together names them itself.
        lines = [
            ": ".join((*map(str, item["loc"]), item["msg"].removeprefix("Value error, "))) for item in error.errors()
        ]
        raise SettingsError("The configuration cannot work:\n  " + "\n  ".join(lines)) from None
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"The file {Path('.env').absolute()} cannot be read: {reason(error)}.") from None
