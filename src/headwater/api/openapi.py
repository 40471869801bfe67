"""The OpenAPI document: every route with every problem it may answer."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from headwater.api.problems import MEDIA_TYPE
from headwater.api.schemas import Problem
from headwater.events import CURSOR_PATTERN, EventType
from headwater.ids import ID_PATTERN
from headwater.transports.sse import MAX_RUNS

_PROBLEMS: Final = {
    400: "The request or its cursor cannot be read.",
    401: "Sign in first.",
    403: "Not allowed from this origin or under this host name.",
    404: "Nothing of that id belongs to the caller.",
    405: "Not with this method.",
    408: "The body did not arrive in time.",
    409: "The chat is answering already; `task_id` says which run.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "The input is not valid; `errors` names each field.",
    429: "Too many at once.",
    500: "Something went wrong on our side.",
    503: "A part of the system is away, or what is named is not known here yet; try again.",
    507: "There is no room to keep the message.",
}
_ALWAYS: Final = (400, 401, 403, 500)
_BODY: Final = (408, 413, 415, 422)

_STREAM_HEADERS: Final = {
    name: {"schema": {"type": "string"}} for name in ("Cache-Control", "X-Accel-Buffering", "X-Request-ID")
}
_FRAMES: Final = (
    "Frames `id: <epoch>-<seq>`, `event: <type>`, `data: <JSON with seq, type, at and the type's own fields>`. "
    "After a terminal event (`done`, `error`, `cancelled`) the stream closes."
)
#: One frame, as an EventSource hands it on.
_FRAME: Final = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "description": "The cursor. Missing where the frame is no event of a log."},
        "event": {"enum": [kind.value for kind in EventType]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_ID: Final = ID_PATTERN.strip("^$")
_RUN: Final = f"{_ID}(:({CURSOR_PATTERN})?)?"
_AFTER: Final = {
    "name": "after",
    "in": "query",
    "required": False,
    "description": "The last event seen. `Last-Event-ID` wins over it.",
    "schema": {"type": "string", "pattern": f"^({CURSOR_PATTERN})?$"},
}
_LAST_EVENT_ID: Final = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": f"^{CURSOR_PATTERN}$"},
}


def problems(*statuses: int, body: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: what may go wrong, as problem documents."""
    every = sorted({*_ALWAYS, *statuses, *(_BODY if body else ())})
    return {status: _problem(_PROBLEMS[status]) for status in every}


def install(app: FastAPI) -> None:
    """Let the app describe itself, with the stream endpoints that stand ahead of it."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = Problem.model_json_schema()
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schema["paths"].update(_streams())
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _problem(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def _streams() -> dict[str, Any]:
    one = {
        "name": "task_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": ID_PATTERN},
    }
    runs = {
        "name": "runs",
        "in": "query",
        "required": True,
        "description": f"Up to {MAX_RUNS} times `<run id>[:<cursor>]`, separated by commas.",
        "schema": {"type": "string", "pattern": f"^{_RUN}(,{_RUN}){{0,{MAX_RUNS - 1}}}$"},
    }
    return {
        "/api/stream/{task_id}": {"get": _stream("follow_run", "Follow one run.", [one, _AFTER, _LAST_EVENT_ID], 404)},
        "/stream/{task_id}": {
            "get": _stream("follow_run_short", "Follow one run, by its short path.", [one, _AFTER, _LAST_EVENT_ID], 404)
        },
        "/api/stream": {"get": _stream("follow_runs", "Follow several runs; `data` names the `run_id`.", [runs])},
    }


def _stream(operation: str, summary: str, parameters: list[dict[str, Any]], *statuses: int) -> dict[str, Any]:
    failures = problems(422, 429, 503, *statuses)
    return {
        "tags": ["streams"],
        "operationId": operation,
        "summary": summary,
        "parameters": parameters,
        "responses": {
            "200": {
                "description": _FRAMES,
                "headers": _STREAM_HEADERS,
                "content": {"text/event-stream": {"schema": _FRAME}},
            },
            "204": {"description": "The cursor is at the end of a run that has ended: do not come back."},
            **{str(status): problem for status, problem in failures.items()},
        },
    }
