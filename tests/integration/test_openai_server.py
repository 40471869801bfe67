"""The scripted OpenAI-compatible server as a process of its own, as other tests start it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest_asyncio

from headwater.providers.base import ChatRequest
from headwater.providers.openai import OpenAIProvider

TESTS = Path(__file__).parent.parent


@pytest_asyncio.fixture
async def base_url(tmp_path: Path) -> AsyncIterator[str]:
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"scenarios": {"from-file": {"steps": [{"words": 3}]}}}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "support.openai_server", "--rate", "0", "--script", str(script),
        cwd=TESTS, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    yield (await process.stdout.readline()).decode().strip()
    process.terminate()
    assert await process.wait() == 0


async def words(base_url: str, model: str, question: str) -> int:
    provider = OpenAIProvider(base_url, model=model)
    request = ChatRequest([{"role": "user", "content": question}], model)
    text = "".join([delta.content async for delta in provider.stream(request)])
    await provider.close()
    return len(text.split())


async def test_it_answers_by_its_file_its_control_and_the_question(base_url: str) -> None:
    root = base_url.removesuffix("/v1")
    assert await words(base_url, "any", "Hi") == 40
    assert await words(base_url, "any", "[[words:7]]") == 7
    assert await words(base_url, "from-file", "Hi") == 3
    assert await words(base_url, "any", "[[scenario:hello]] Hi") == 2

    async with aiohttp.ClientSession() as session:
        script = {"scenarios": {"posted": {"steps": [{"wait": "go"}, {"words": 5}]}}}
        async with session.post(f"{root}/_script", json=script) as response:
            assert response.status == 200
        waiting = asyncio.create_task(words(base_url, "any", "[[scenario:posted]]"))
        async with session.post(f"{root}/_release/go") as response:
            assert response.status == 200
        assert await waiting == 5
        async with session.get(f"{root}/_requests") as response:
            requests = await response.json()

    assert [request["scenario"] for request in requests] == ["default", "default", "from-file", "hello", "posted"]
    assert all(request["finished_at"] and not request["disconnected_at"] for request in requests)
