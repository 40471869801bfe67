"""Health, probes and metrics: what operators and their machines ask."""

from __future__ import annotations

from fastapi import APIRouter, Response

from headwater.api.openapi import problems
from headwater.api.routes import Parts
from headwater.api.schemas import Health, Part

router = APIRouter(tags=["operations"])


@router.get(
    "/api/health", responses={503: {"model": Health, "description": "Messages cannot be accepted."}, **problems()}
)
async def health(graph: Parts, response: Response) -> Health:
    """How every part is. `degraded`: messages are accepted although a part is away."""
    parts = await graph.checkup.parts()
    status = graph.checkup.status(parts)
    if status == "down":
        response.status_code = 503
    return Health.model_validate({**graph.about, "status": status, "parts": parts})


@router.get("/healthz")
async def alive() -> dict[str, bool]:
    """The process answers. Says nothing about other parts: restarting it would not mend them."""
    return {"ok": True}


@router.get("/readyz", responses={503: {"model": Part, "description": "Messages cannot be accepted now."}})
async def ready(graph: Parts, response: Response) -> Part:
    """Whether messages can be accepted here: the journal can be written and the server is not about to stop."""
    if graph.streams.draining:
        response.status_code = 503
        return Part(ok=False, detail="the server is about to stop")
    journal = (await graph.checkup.parts())["journal"]
    if not journal["ok"]:
        response.status_code = 503
    return Part.model_validate(journal)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems()},
)
async def metrics(graph: Parts) -> Response:
    """The metrics of this process in Prometheus's text format."""
    return Response(graph.telemetry.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
