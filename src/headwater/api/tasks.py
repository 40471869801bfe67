"""Runs, under both their names: how far one is, its events by polling, and stopping it."""

from __future__ import annotations

from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Response

from headwater.api.openapi import problems
from headwater.api.routes import Parts, Who
from headwater.api.schemas import Cancelled, Events, TaskId, TaskOut, Text
from headwater.transports.base import cursor_of
from headwater.transports.poll import MAX_LIMIT, MAX_WAIT

router = APIRouter(tags=["runs"])


@router.get("/api/task/{task_id}", responses=problems(404, 422, 503))
async def get_task(graph: Parts, caller: Who, task_id: TaskId) -> TaskOut:
    """Where a run is."""
    return TaskOut.of(await graph.reading.run_view(caller, task_id))


@router.post(
    "/api/task/{task_id}/cancel",
    responses={
        202: {"model": Cancelled, "description": "Asked for; the worker confirms."},
        **problems(404, 422, 503, 507),
    },
)
async def cancel_task(graph: Parts, caller: Who, task_id: TaskId, response: Response) -> Cancelled:
    """Stop a run; what it said is kept. 200: it has ended. 202: its worker was told and confirms by `cancelled`."""
    stopped = await graph.intake.cancel(caller, task_id)
    if not stopped.ended:
        response.status_code = 202
    return Cancelled.model_validate(stopped)


@router.get("/api/runs/{run_id}/events", response_model=Events, responses=problems(404, 422, 429, 503))
async def poll_events(
    graph: Parts,
    caller: Who,
    run_id: TaskId,
    after: Annotated[Text | None, Query(max_length=60, description="The last event seen: `<epoch>-<seq>`.")] = None,
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT, description="Seconds to wait for the next event.")] = 0.0,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 200,
) -> Response:
    """Events after a cursor, for clients that cannot keep a stream."""
    answer = await graph.poll.events(caller, run_id, cursor_of(after), wait, limit)
    # Events are JSON already and are passed on as they are.
    rest = orjson.dumps(
        {"cursor": str(answer.cursor) if answer.cursor else None, "reset": answer.reset, "done": answer.done}
    )
    items = b",".join(event.encode() for event in answer.events)
    return Response(b'{"items":[' + items + b"]," + rest[1:], media_type="application/json")
