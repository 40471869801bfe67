"""Chats: make, list, show, rename, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Query, Response

from headwater.api.openapi import problems
from headwater.api.routes import IdempotencyKey, Parts, Who
from headwater.api.schemas import ActiveTask, ChatId, ChatList, ChatOut, ChatSummary, NewChat, Rename, Text
from headwater.intake.checks import TITLE_LIMIT

router = APIRouter(prefix="/api/chats", tags=["chats"])


@router.get("", responses=problems(422, 503))
async def list_chats(
    graph: Parts,
    caller: Who,
    after: Annotated[Text | None, Query(max_length=200, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    q: Annotated[Text | None, Query(max_length=TITLE_LIMIT, description="Part of the title.")] = None,
) -> ChatList:
    """The caller's chats, the latest first."""
    page = await graph.reading.list_chats(caller, after=after or None, limit=limit, query=q or None)
    runs = await graph.reading.active_tasks(caller) if page.items else []
    # Of several in a chat the oldest answers and the others wait for it.
    active = {run.chat_id: run.id for run in reversed(runs)}
    items = [ChatSummary.of(chat, active.get(chat.id)) for chat in page.items]
    return ChatList(items=items, next=page.next, degraded=page.degraded)


@router.post("", status_code=201, responses=problems(503, 507, body=True))
async def create_chat(
    graph: Parts,
    caller: Who,
    response: Response,
    body: Annotated[NewChat | None, Body()] = None,
    idempotency_key: IdempotencyKey = None,
) -> ChatSummary:
    """Begin a chat."""
    chat = await graph.intake.create_chat(caller, title=body.title if body else None, key=idempotency_key)
    response.headers["Location"] = f"/api/chats/{chat.id}"
    return ChatSummary.of(chat, None)


@router.get("/{chat_id}", responses=problems(404, 422, 503))
async def get_chat(graph: Parts, caller: Who, chat_id: ChatId) -> ChatOut:
    """A chat with its messages, oldest first."""
    view = await graph.reading.get_chat(caller, chat_id)
    active = await graph.reading.active_task(caller, chat_id)
    return ChatOut.whole(view.chat, active.id if active else None, view.messages, degraded=view.degraded)


@router.patch("/{chat_id}", responses=problems(404, 503, body=True))
async def rename_chat(graph: Parts, caller: Who, chat_id: ChatId, body: Rename) -> ChatSummary:
    """Give a chat a title."""
    chat = await graph.intake.rename_chat(caller, chat_id, body.title)
    active = await graph.reading.active_task(caller, chat_id)
    return ChatSummary.of(chat, active.id if active else None)


@router.delete("/{chat_id}", status_code=204, responses=problems(404, 422, 503, 507))
async def delete_chat(graph: Parts, caller: Who, chat_id: ChatId) -> None:
    """Delete a chat with its messages. A run that is answering in it is cancelled first."""
    await graph.intake.delete_chat(caller, chat_id)


@router.get("/{chat_id}/active-task", responses=problems(404, 422, 503))
async def active_task(graph: Parts, caller: Who, chat_id: ChatId) -> ActiveTask:
    """The run that answers in the chat now, for a page that comes back."""
    run = await graph.reading.active_task(caller, chat_id)
    return ActiveTask(task_id=run.id if run else None)
