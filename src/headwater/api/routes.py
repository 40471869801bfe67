"""Routes by noun. Handlers fetch what they need from the graph, ask one part, and shape the answer."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from fastapi import Depends, Header, Request

from headwater.access import Caller
from headwater.api.graph import Graph, started
from headwater.intake.checks import KEY_PATTERN


# `async`, though they wait for nothing: FastAPI calls what is not in a thread of its own.
async def _graph(request: Request) -> Graph:
    return started(request.app.state.graph)


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


#: The parts of this process.
Parts: TypeAlias = Annotated[Graph, Depends(_graph)]
#: Who asks; the gate has checked it.
Who: TypeAlias = Annotated[Caller, Depends(_caller)]
IdempotencyKey: TypeAlias = Annotated[
    str | None,
    Header(
        pattern=KEY_PATTERN,
        description="Sending the same request again under the same key gives the first answer and does nothing twice.",
    ),
]
