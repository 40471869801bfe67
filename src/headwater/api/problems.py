"""Problem documents (RFC 9457): what every error looks like to a client.

    {"type": "urn:headwater:problem:chat_busy", "title": …, "status": 409, "detail": …,
     "code": "chat_busy", "instance": "/api/chats/…", "request_id": …, "task_id": …}

`code` is stable; `detail` is a sentence for a person. What we did not foresee is logged with its
traceback and the request's id, and shows neither.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from headwater.errors import HeadwaterError, SignInRequired

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"

#: Codes of errors that the framework finds, by status.
_CODES: Final = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_input",
}


def respond(error: BaseException, *, path: str, request_id: str) -> Response:
    """The response for any error. Logs what nobody foresaw."""
    headers: dict[str, str] = {}
    if isinstance(error, HeadwaterError):
        status, code, title, detail, extra = error.status, error.code, error.title, str(error), error.extra
        if isinstance(error, SignInRequired):
            headers["www-authenticate"] = "Bearer"
        if error.retryable:
            headers["retry-after"] = "1"
    elif isinstance(error, HTTPException):
        status, title, extra = error.status_code, HTTPStatus(error.status_code).phrase, {}
        code = _CODES.get(status, "bad_request" if status < 500 else "internal")
        detail = error.detail
        headers.update(error.headers or {})
    elif isinstance(error, RequestValidationError):
        return respond_invalid(error, path=path, request_id=request_id)
    else:
        logger.error("request %s to %s failed", request_id, path, exc_info=error)
        status, code, title, extra = 500, "internal", HeadwaterError.title, {}
        detail = f"It is in the server's log under request {request_id}."
    if status >= 500 and isinstance(error, HeadwaterError):
        logger.warning("request %s to %s: %s: %s", request_id, path, code, detail)
    return _response(status, code, title, detail, path, request_id, extra, headers)


def respond_invalid(error: RequestValidationError, *, path: str, request_id: str) -> Response:
    """422 that names every field. The input itself is not repeated: it may be large, secret or not even text."""
    errors = [_fault(item) for item in error.errors()[:20]]
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors) or "The input is not valid."
    extra = {"errors": errors}
    return _response(422, "invalid_input", "The input is not valid", detail, path, request_id, extra, {})


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Let the app answer every error this way. `routes` are all there are: a 405 names every method of its path."""

    async def handle(request: Request, error: Exception) -> Response:
        path = request.url.path
        if isinstance(error, HTTPException) and error.status_code == 405:
            # The framework names the methods of the first route it finds; RFC 9110 wants those of the resource.
            known = (route for route in routes if isinstance(route, APIRoute) and route.path_regex.match(path))
            allowed = sorted({method for route in known for method in route.methods or ()})
            error = (
                HTTPException(405, f"Use {' or '.join(allowed)}.", {"Allow": ", ".join(allowed)}) if allowed else error
            )
        return respond(error, path=path, request_id=request.state.request_id)

    for kind in (HeadwaterError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle)


def _response(
    status: int,
    code: str,
    title: str,
    detail: str,
    path: str,
    request_id: str,
    extra: Mapping[str, Any],
    headers: Mapping[str, str],
) -> Response:
    document = {
        "type": f"urn:headwater:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "instance": path,
        "request_id": request_id,
        **extra,
    }
    body = orjson.dumps(_clean(document))
    return Response(body, status, {**headers, "content-type": MEDIA_TYPE, "cache-control": "no-store"})


def _fault(item: Mapping[str, Any]) -> dict[str, str]:
    if item["type"] == "json_invalid":
        position = item["loc"][-1]
        return {"field": "body", "message": f"Not valid JSON at character {position}: {item['ctx']['error']}"}
    parts = [str(part) for part in item["loc"]]
    # The first says where it stood: body, query, path, header.
    return {"field": ".".join(parts[1:] or parts)[:200], "message": str(item["msg"])}


def _clean(value: Any) -> Any:
    """Text that came from a request may hold lone surrogates, which no UTF-8 can carry."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
