"""Messages: say something, have it answered, have it answered again."""

from __future__ import annotations

from fastapi import APIRouter, Response

from headwater.api.openapi import problems
from headwater.api.routes import IdempotencyKey, Parts, Who
from headwater.api.schemas import AcceptedOut, ChatId, MessageId, NewMessage
from headwater.intake import UNSET, Accepted

router = APIRouter(tags=["messages"])


@router.post(
    "/conversations/{chat_id}/messages",
    status_code=202,
    responses=problems(404, 409, 429, 503, 507, body=True),
    operation_id="send_message_short",
)
@router.post("/api/chats/{chat_id}/messages", status_code=202, responses=problems(404, 409, 429, 503, 507, body=True))
async def send_message(
    graph: Parts,
    caller: Who,
    chat_id: ChatId,
    body: NewMessage,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> AcceptedOut:
    """Say something. 202: the message is on disk and its answer is under way at `Location`."""
    parent_id = body.parent_id if "parent_id" in body.model_fields_set else UNSET
    accepted = await graph.intake.send(
        caller,
        chat_id,
        body.content,
        parent_id=parent_id,
        key=idempotency_key,
        when_busy=body.when_busy,
        priority=body.priority,
    )
    return _answer(accepted, response)


@router.post(
    "/api/chats/{chat_id}/messages/{message_id}/regenerate",
    status_code=202,
    responses=problems(404, 409, 422, 429, 503, 507),
)
async def regenerate(
    graph: Parts,
    caller: Who,
    chat_id: ChatId,
    message_id: MessageId,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> AcceptedOut:
    """Have a message answered again. The new answer stands beside the old one, under the same parent."""
    return _answer(await graph.intake.regenerate(caller, chat_id, message_id, key=idempotency_key), response)


def _answer(accepted: Accepted, response: Response) -> AcceptedOut:
    response.headers["Location"] = f"/api/stream/{accepted.task_id}"
    return AcceptedOut.model_validate(accepted)
