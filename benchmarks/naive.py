"""The usual server of such a design: every reader has a Redis subscription of its own and FastAPI streams it.

`python -m benchmarks.naive PORT REDIS_URL`, with two endpoints:

    /stream/{id}   redis-py's `listen()`, passed on as it comes
    /poll/{id}     `get_message(timeout)`, a look at the connection, JSON read and written: the form most tutorials show
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from redis.asyncio import Redis


def make_app(redis_url: str) -> FastAPI:
    app = FastAPI()
    # With redis-py's default the hundred-and-first reader would get an error.
    redis = Redis.from_url(redis_url, decode_responses=True, max_connections=20_000)

    @app.get("/stream/{task_id}")
    async def stream(task_id: str) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            async with redis.pubsub() as pubsub:
                await pubsub.subscribe(f"stream:{task_id}")
                async for message in pubsub.listen():
                    if message["type"] == "message":
                        yield f"data: {message['data']}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/poll/{task_id}")
    async def poll(task_id: str, request: Request) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            async with redis.pubsub() as pubsub:
                await pubsub.subscribe(f"stream:{task_id}")
                while not await request.is_disconnected():
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1.0)
                    if message is not None:
                        chunk = json.loads(message["data"])
                        yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[2]), port=int(sys.argv[1]), log_level="error", backlog=2048)
