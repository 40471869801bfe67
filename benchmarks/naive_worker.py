"""The usual worker: a Celery task holds one answer, the official client reads it, a token is three calls of redis-py.

celery -A benchmarks.naive_worker worker --pool prefork|threads, with REDIS_URL and OPENAI_BASE_URL.
"""

from __future__ import annotations

import json
import os
import time

import redis
from celery import Celery
from openai import OpenAI

TASK = "naive.answer"

app = Celery("naive", broker=os.environ["REDIS_URL"], set_as_current=False)
app.conf.update(worker_prefetch_multiplier=1, task_acks_late=True)
client = OpenAI(api_key="none", base_url=os.environ.get("OPENAI_BASE_URL"))
store = redis.Redis.from_url(os.environ["REDIS_URL"])


@app.task(name=TASK, ignore_result=True)  # type: ignore[untyped-decorator]
def answer(task_id: str) -> None:
    """Stream one answer: into the list for readers that come later, to the channel for those that are there."""
    chunks, channel, metadata = f"stream:{task_id}:chunks", f"stream:{task_id}", f"stream:{task_id}:metadata"
    stream = client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "Tell me."}], stream=True
    )
    index = 0
    for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            index += 1
            data = json.dumps({"chunk_index": index, "chunk_type": "content", "content": text})
            store.rpush(chunks, data)
            store.publish(channel, data)
            store.hset(
                metadata, mapping={"status": "processing", "chunk_count": index, "updated_at": repr(time.time())}
            )
    store.publish(channel, json.dumps({"chunk_type": "done"}))
    store.expire(chunks, 3600)
    store.expire(metadata, 3600)
