"""What requests and responses look like, for validation and for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import Path
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from headwater.clock import to_datetime
from headwater.ids import ID_PATTERN
from headwater.intake.checks import TITLE_LIMIT
from headwater.messages import Chat, Message, MessageStatus, Role, flaw_of
from headwater.runs import Priority, Run, RunState
from headwater.settings import WhenBusy

#: Not only white space, and no NUL.
_SAYS_SOMETHING = "^[^\\u0000]*[^\\s\\u0000][^\\u0000]*$"


def _storable(text: str) -> str:
    flaw = flaw_of(text)
    if flaw is not None:
        raise ValueError(flaw)
    return text


#: Text that PostgreSQL can keep.
Text: TypeAlias = Annotated[str, AfterValidator(_storable), Field(json_schema_extra={"pattern": "^[^\\u0000]*$"})]
Title: TypeAlias = Annotated[
    Text, Field(min_length=1, max_length=TITLE_LIMIT, json_schema_extra={"pattern": _SAYS_SOMETHING})
]
Id: TypeAlias = Annotated[str, Field(pattern=ID_PATTERN, examples=["0198c0de-7abc-7def-8123-456789abcdef"])]
ChatId: TypeAlias = Annotated[str, Path(pattern=ID_PATTERN, description="The chat's id.")]
MessageId: TypeAlias = Annotated[str, Path(pattern=ID_PATTERN, description="The message's id.")]
TaskId: TypeAlias = Annotated[str, Path(pattern=ID_PATTERN, description="The run's id, as the 202 gave it.")]


def rfc3339(value: Any) -> Any:
    """Unix milliseconds as RFC 3339 in UTC, e.g. `2026-01-01T00:00:00.123Z`."""
    if isinstance(value, int):
        return to_datetime(value).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return value


Moment: TypeAlias = Annotated[
    str,
    BeforeValidator(rfc3339),
    Field(json_schema_extra={"format": "date-time"}, examples=["2026-01-01T00:00:00.123Z"]),
]


class Model(BaseModel):
    """Base of responses."""

    model_config = ConfigDict(from_attributes=True)


class Request(BaseModel):
    """Base of request bodies: an unknown member is a mistake, and is said."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """An error (RFC 9457). `code` is stable; `detail` is for a person. Some codes bring further members."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str
    request_id: str


class Fault(Model):
    """Why an answer failed."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    retryable: bool = Field(False, description="Whether asking again as it is may help.")


class Usage(Model):
    """Tokens; `estimated` when the model's API did not report them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated: bool = False


class NewChat(Request):
    """A chat to be. Without a title it is named after its first message."""

    title: Title | None = None


class Rename(Request):
    """A chat's new title."""

    title: Title


class ChatSummary(Model):
    """A chat in a list."""

    id: Id
    title: str | None
    created_at: Moment
    updated_at: Moment
    active_task_id: Id | None = Field(description="The run that answers now; follow `/api/stream/{task_id}`.")

    @classmethod
    def of(cls, chat: Chat, active: str | None) -> ChatSummary:
        return cls(
            id=chat.id, title=chat.title, created_at=chat.created_at, updated_at=chat.updated_at, active_task_id=active
        )


class MessageOut(Model):
    """A message. Messages of a chat form a tree by `parent_id`."""

    id: Id
    parent_id: Id | None
    role: Role
    content: str
    reasoning: str | None
    status: MessageStatus
    run_id: Id | None
    model: str | None
    usage: Usage | None
    error: Fault | None
    created_at: Moment


class ChatOut(ChatSummary):
    """A chat with its messages, oldest first."""

    messages: list[MessageOut]
    degraded: bool = Field(description="PostgreSQL is away: earlier messages may be missing.")

    @classmethod
    def whole(cls, chat: Chat, active: str | None, messages: Sequence[Message], *, degraded: bool) -> ChatOut:
        summary = ChatSummary.of(chat, active)
        shown = [MessageOut.model_validate(message) for message in messages]
        return cls(**dict(summary), messages=shown, degraded=degraded)


class ChatList(Model):
    """A page of chats, newest first."""

    items: list[ChatSummary]
    next: str | None = Field(description="Send it as `after` for the next page; null at the end.")
    degraded: bool = Field(description="PostgreSQL is away: these are the chats that are at hand.")


class NewMessage(Request):
    """What a person says."""

    content: Annotated[
        Text,
        Field(
            min_length=1,
            description="Not only white space.",
            json_schema_extra={"pattern": _SAYS_SOMETHING},
        ),
    ]
    parent_id: Id | None = Field(
        None,
        description="The message it follows. Left out: the chat's newest. Null: the first of a branch at the root. "
        "Editing a message is sending another with the same parent.",
    )
    when_busy: WhenBusy | None = Field(
        None,
        description="Should the chat be answering: `reject` this message (409), `enqueue` it behind what is answered, "
        "or `interrupt` and stop that first. Left out or null: as HEADWATER_WHEN_BUSY says.",
    )
    priority: Priority = Field(
        Priority.NORMAL,
        description="Which of the runs that wait for a worker goes first: `urgent`, `normal`, or `background` for what "
        "nobody waits for.",
    )


class AcceptedOut(Model):
    """The message is kept and its answer is under way: follow `/api/stream/{task_id}`."""

    task_id: Id
    message_id: Id = Field(description="The answer's id.")
    user_message_id: Id | None
    chat_id: Id
    status: Literal["processing"] = "processing"


class ActiveTask(Model):
    """The run that answers now, or null."""

    task_id: Id | None


class TaskOut(Model):
    """Where a run is."""

    task_id: Id
    status: RunState
    kind: str
    attempt: int
    stage: str | None
    progress: float
    chat_id: Id | None
    message_id: Id | None
    error: Fault | None
    usage: Usage | None
    created_at: Moment
    started_at: Moment | None
    ended_at: Moment | None

    @classmethod
    def of(cls, run: Run) -> TaskOut:
        fields = {name: getattr(run, name) for name in cls.model_fields if name not in {"task_id", "status"}}
        return cls(task_id=run.id, status=run.state, **fields)


class Cancelled(Model):
    """How a cancel stands: `cancelling` until the run's worker confirms, else how the run ended."""

    task_id: Id
    status: Literal["cancelling", "done", "failed", "cancelled"]


class Events(Model):
    """A page of a run's events."""

    items: list[Mapping[str, Any]]
    cursor: str | None = Field(description="Send it as `after` next time.")
    reset: bool = Field(description="Earlier events are gone: forget what was shown, these begin anew.")
    done: bool = Field(description="The run has ended and nothing follows.")


class Part(Model):
    """One part of the system."""

    model_config = ConfigDict(extra="allow")

    ok: bool
    detail: str = ""


class Health(Model):
    """How the system is. `degraded`: messages are accepted, something else is away."""

    status: Literal["ok", "degraded", "down"]
    demo: bool = Field(description="No model is configured; the built-in demo answers.")
    model: str
    version: str
    when_busy: WhenBusy = Field(description="What becomes of a message to a chat that is answering.")
    access: Literal["open", "token"] = Field(description="`token`: callers sign in, and may sign out.")
    parts: Mapping[str, Part]
