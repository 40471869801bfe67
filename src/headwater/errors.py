"""Every error of headwater.

    HeadwaterError
    ├── SettingsError            the configuration cannot work
    ├── RequestError             the caller can mend it
    │   ├── InvalidInput         422
    │   ├── BadCursor            400
    │   ├── BadRequest           400
    │   ├── SignInRequired       401
    │   ├── Forbidden            403
    │   ├── NotFound             404
    │   ├── ChatBusy             409
    │   ├── KeyReused            422
    │   ├── TooLarge             413
    │   └── TooMany              429
    │       └── ChatQueueFull    429
    ├── Unavailable              a part is away; trying again later helps
    │   ├── NotKnownYet          503  on its way from another host, perhaps
    │   ├── StoreUnavailable     503  PostgreSQL
    │   ├── LogUnavailable       503  Redis
    │   └── JournalUnavailable   503  the local disk
    │       ├── JournalFull      507
    │       ├── JournalBusy      503
    │       └── JournalDamaged   503
    ├── RecordRefused            data that PostgreSQL or the journal can never keep
    ├── LogRefused               an append or a claim that must not happen
    │   ├── Fenced               a newer attempt owns the run
    │   ├── LogClosed            the run has ended
    │   ├── LogLost              Redis forgot the log
    │   └── LeaseHeld            somebody else holds the run
    ├── ProviderError            the model's API, see `code`
    └── RunFailed                a run ends with this code

The class docstring says when it is raised and what to do; the message says it for one case.
"""

from __future__ import annotations

from typing import Any, ClassVar


def reason(error: BaseException) -> str:
    """What an error says, without a full stop, for a log or a message; time-outs and some others of foreign code say
    nothing themselves."""
    said = str(error).strip().removesuffix(".")
    return said or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


class HeadwaterError(Exception):
    """Base of all errors. `code` is stable and machine-readable; `str(error)` is a sentence for a person."""

    code: str = "internal"
    #: HTTP status when it reaches a client.
    status: ClassVar[int] = 500
    #: A short title for problem+json; the same for every error with this code.
    title: ClassVar[str] = "Something went wrong on our side"
    #: Whether the same call may succeed later, unchanged.
    retryable: bool = False

    def __init__(self, message: str | None = None, **extra: Any) -> None:
        super().__init__(message or self.title)
        #: Further members of the problem document, e.g. the active `task_id` of a busy chat.
        self.extra = extra


class SettingsError(HeadwaterError):
    """A setting is missing or contradicts another. Mend the environment or `.env` and start again."""

    code = "settings"
    title = "The configuration cannot work"


# --- the caller can mend it ---------------------------------------------------------------------


class RequestError(HeadwaterError):
    """Base of errors that the caller can mend by sending something else."""

    code = "bad_request"
    status = 400
    title = "The request cannot be understood"


class BadRequest(RequestError):
    """The request is malformed. The message says where."""


class InvalidInput(RequestError):
    """A field is missing, empty, too long or of the wrong type. The message names the field."""

    code = "invalid_input"
    status = 422
    title = "The input is not valid"


class BadCursor(RequestError):
    """A cursor is not of the form `<epoch>-<seq>`. Send one that a stream gave, or none to start at the beginning."""

    code = "bad_cursor"
    title = "The cursor cannot be read"


class SignInRequired(RequestError):
    """No valid credentials. Send `Authorization: Bearer <token>` or sign in at `/sign-in`."""

    code = "sign_in_required"
    status = 401
    title = "Sign in first"


class Forbidden(RequestError):
    """The request comes from a place that may not send it: a foreign origin or an unknown host name."""

    code = "forbidden"
    status = 403
    title = "Not allowed from here"


class NotFound(RequestError):
    """Nothing of that id belongs to the caller. Ids of other owners give the same answer."""

    code = "not_found"
    status = 404
    title = "Not found"


class ChatBusy(RequestError):
    """The chat is answering already. Follow or cancel `task_id`, then send again."""

    code = "chat_busy"
    status = 409
    title = "This chat is still answering"

    def __init__(self, task_id: str) -> None:
        super().__init__(
            "This chat is still answering. Wait for the answer or stop it, then send again.", task_id=task_id
        )


class KeyReused(RequestError):
    """The Idempotency-Key was used with another body. Use a new key for a new message."""

    code = "idempotency_key_reused"
    status = 422
    title = "The Idempotency-Key belongs to another request"


class TooLarge(RequestError):
    """The body is over the limit. The message gives the limit in bytes."""

    code = "too_large"
    status = 413
    title = "The request is too large"


class TooMany(RequestError):
    """A limit per owner is reached, such as open streams. Close one or wait."""

    code = "too_many"
    status = 429
    title = "Too many at once"
    retryable = True


class ChatQueueFull(TooMany):
    """So many messages wait in the chat that no more are taken. Wait for an answer or stop one, then send again."""

    code = "chat_queue_full"
    title = "Too many messages wait in this chat"

    def __init__(self, task_id: str, limit: int) -> None:
        super().__init__(
            f"{limit} messages wait in this chat already. Wait for an answer or stop one, then send again.",
            task_id=task_id,
        )


# --- a part is away -----------------------------------------------------------------------------


class Unavailable(HeadwaterError):
    """Base of errors of a part that is away. Nothing was half done; trying again later helps."""

    code = "unavailable"
    status = 503
    title = "A part of the system is away"
    retryable = True


class NotKnownYet(Unavailable):
    """Nobody here knows the id, but what it names may have been accepted elsewhere a moment ago and be on its way.
    Ask again in a moment; what does not exist is `not_found` a minute after its id was made."""

    code = "not_known_yet"
    title = "Not known here yet"


class StoreUnavailable(Unavailable):
    """PostgreSQL does not answer in time. Check `DATABASE_URL` and `headwater doctor`."""

    code = "store_unavailable"
    title = "The database is away"


class LogUnavailable(Unavailable):
    """Redis does not answer in time. Check `REDIS_URL` and `headwater doctor`."""

    code = "log_unavailable"
    title = "The live stream is away"


class JournalUnavailable(Unavailable):
    """The journal cannot be used, so nothing can be accepted. The message says why and what to do; `code` is one of
    `journal_unwritable`, `journal_moved`, `journal_foreign`, `journal_newer`, `journal_sqlite`, `journal_closed`,
    `journal_failed`, or that of a class below."""

    code = "journal_failed"
    title = "The journal cannot be used"


class JournalFull(JournalUnavailable):
    """The disk under the journal is full. Free space, then send again."""

    code = "storage_full"
    status = 507
    title = "There is no room to keep the message"


class JournalBusy(JournalUnavailable):
    """Another process holds the journal's file for too long. Send again; when it stays so, see who has it open."""

    code = "journal_busy"
    title = "The journal is held by another process"


class JournalDamaged(JournalUnavailable):
    """The journal's file is damaged and left as it is. Stop what uses it and run `headwater journal salvage`."""

    code = "journal_damaged"
    title = "The journal is damaged"
    retryable = False


class RecordRefused(HeadwaterError):
    """Data that can never be stored, such as text with a NUL character. The syncer sets such a record aside;
    repeating the call does not help."""

    code = "record_refused"
    status = 422
    title = "This cannot be stored"


# --- the log refuses ----------------------------------------------------------------------------


class LogRefused(HeadwaterError):
    """Base of refusals of the log. They are the fence that keeps a run to one writer."""

    code = "log_refused"
    status = 409
    title = "The log refused the write"


class Fenced(LogRefused):
    """A newer attempt owns the run. Stop at once and write nothing more."""

    code = "fenced"


class LogClosed(LogRefused):
    """The run has ended; its log takes no more events."""

    code = "log_closed"


class LogLost(LogRefused):
    """Redis has no log, or a shorter one than the holder wrote. The holder rewrites it under the same epoch."""

    code = "log_lost"


class LeaseHeld(LogRefused):
    """Another worker holds the run and its lease has not run out. Leave it alone."""

    code = "lease_held"


# --- what ends a run ----------------------------------------------------------------------------


class RunFailed(HeadwaterError):
    """Base of the errors that end a run as `failed`. `code` and the message go into the `error` event."""

    code = "run_failed"
    title = "The run failed"

    def __init__(self, message: str | None = None, *, code: str | None = None, **extra: Any) -> None:
        super().__init__(message, **extra)
        if code is not None:
            self.code = code


class ProviderError(RunFailed):
    """The model's API failed. `code` is one of `provider_auth`, `provider_model`, `provider_rejected`,
    `provider_rate_limited`, `provider_unavailable`, `provider_timeout`, `provider_cut`, `provider_malformed`."""

    code = "provider_unavailable"
    title = "The model's API failed"

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message, code=code, **extra)
        self.retryable = retryable
        #: Seconds the API asked us to wait, if it said so.
        self.retry_after = retry_after


class Interrupted(RunFailed):
    """The worker died and the run's kind says to keep the partial answer, or all attempts are spent."""

    code = "worker_lost"
    title = "The worker was lost"
    retryable = True


class DeadlineExceeded(RunFailed):
    """The run took longer than its kind allows."""

    code = "deadline"
    title = "The run took too long"
    retryable = True
