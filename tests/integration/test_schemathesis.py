"""The OpenAPI document holds: whatever fits it or misses it, no answer breaks it and none is a 5xx."""

from __future__ import annotations

import re
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings

from headwater.api.app import make_api
from headwater.ids import new_id
from headwater.intake.checks import KEY_PATTERN
from support.stack import Stack

#: Seconds; a stream of a run that goes on would be read for ever, and no generated id names one.
TIMEOUT = 10
#: What a key looks like that is not refused for its form.
KEY_FORM = re.compile(KEY_PATTERN)


#: What fits the document may still be a cursor that nobody gave (400), or an id that looks like a young one's (503).
CONFIG = schemathesis.Config.from_dict(
    {"checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "409", "503"]}}}
)

schema = schemathesis.openapi.from_dict(make_api().openapi(), config=CONFIG)


@schema.parametrize()
@settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_the_document_holds(case: schemathesis.Case[Any], stack: Stack) -> None:
    if case.headers and KEY_FORM.fullmatch(str(case.headers.get("idempotency-key", ""))):
        # Generated keys repeat, and a key that repeats with another body is refused, as it must be.
        case.headers["idempotency-key"] = new_id()
    answer = case.call(base_url=stack.base_url, timeout=TIMEOUT)
    # All else that is a 5xx is a fault.
    young = answer.status_code == 503 and answer.json()["code"] == "not_known_yet"
    case.validate_response(answer, excluded_checks=[schemathesis.checks.not_a_server_error] if young else None)


async def test_the_document_names_every_route_and_every_problem(stack: Stack) -> None:
    async with stack.client() as http:
        document = (await http.get("/openapi.json")).json()
    routes = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert routes == {
        ("GET", "/api/chats"),
        ("POST", "/api/chats"),
        ("GET", "/api/chats/{chat_id}"),
        ("PATCH", "/api/chats/{chat_id}"),
        ("DELETE", "/api/chats/{chat_id}"),
        ("GET", "/api/chats/{chat_id}/active-task"),
        ("POST", "/api/chats/{chat_id}/messages"),
        ("POST", "/conversations/{chat_id}/messages"),
        ("POST", "/api/chats/{chat_id}/messages/{message_id}/regenerate"),
        ("GET", "/api/stream"),
        ("GET", "/api/stream/{task_id}"),
        ("GET", "/stream/{task_id}"),
        ("GET", "/api/task/{task_id}"),
        ("POST", "/api/task/{task_id}/cancel"),
        ("GET", "/api/runs/{run_id}/events"),
        ("GET", "/api/health"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
    }
    for path, item in document["paths"].items():
        for method, operation in item.items():
            failures = {
                status: answer
                for status, answer in operation["responses"].items()
                if status >= "400" and path not in {"/healthz", "/readyz"} and (path, status) != ("/api/health", "503")
            }
            for status, answer in failures.items():
                assert list(answer["content"]) == ["application/problem+json"], (method, path, status)
    operations = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(operations) == len(set(operations))
