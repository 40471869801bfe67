"""A scripted OpenAI-compatible HTTP server. It has every byte and every pause of an answer in its hand.

In a test's own loop:

    async with OpenAIServer() as server:
        server.scenarios["odd"] = Scenario([{"send": "data: [DONE]\\n\\n"}])
        provider = OpenAIProvider(server.base_url, model="m")

As a process: `python -m support.openai_server --port 0 [--script FILE] [--rate 50] [--words 40]`. It
prints its address, up to `/v1`, as its first line.

Which scenario answers: `[[scenario:NAME]]` in the last user message, or else the model's name when it is
a scenario's, or else the default, which streams words made from the question. `[[words:N]]` and
`[[rate:N]]` (words a second; 0 for no pause) in the message change the default's. `openai_scenarios` says what a
scenario is and has the named ones.

Control: GET /_requests, POST /_script {"scenarios": {name: scenario}, "default": scenario | null},
POST /_release/<name>, POST /_reset.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from support.openai_scenarios import Scenario, Step, answer, builtin_scenarios, chunk, frame, pieces, refusal


@dataclass
class Received:
    """One request and what became of it. Times are the seconds of the loop.time() of the server."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float
    #: Numbers the TCP connections, so that a test sees which were used again.
    connection: int
    scenario: str = ""
    #: Bytes of the body that were sent.
    sent: int = 0
    finished_at: float | None = None
    #: The client left before the answer was whole.
    disconnected_at: float | None = None

    @property
    def question(self) -> str:
        messages = self.body.get("messages", []) if isinstance(self.body, dict) else []
        return next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")


class _Cut(Exception):
    """The script says to reset the connection."""


class OpenAIServer:
    """The server. `scenarios`, `default`, `models` and `unsupported` may be changed at any time."""

    def __init__(self, *, words: int = 40, rate: float = 0, port: int = 0, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = port
        self.words = words
        self.rate = rate
        self.scenarios = builtin_scenarios()
        self.default: Scenario | None = None
        self.models = ["scripted", "gpt-4o-mini"]
        #: Whether there is a list of models.
        self.listing = True
        #: Parameters that are refused with a 400, as newer or smaller servers do.
        self.unsupported: set[str] = set()
        self.requests: list[Received] = []
        self._released: dict[str, asyncio.Event] = {}
        self._used: Counter[tuple[str, str]] = Counter()
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def base_url(self) -> str:
        """The address to give as OPENAI_BASE_URL."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def chats(self) -> list[Received]:
        """The requests for an answer, oldest first."""
        return [request for request in self.requests if request.path.partition("?")[0].endswith("/chat/completions")]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def release(self, name: str) -> None:
        """Let the scenarios go on that wait for `name`, now and later."""
        self._event(name).set()

    def reset(self) -> None:
        """Forget requests, scripts and releases."""
        self.scenarios, self.default = builtin_scenarios(), None
        self.listing = True
        self.requests.clear()
        self.unsupported.clear()
        self._released.clear()
        self._used.clear()

    def load(self, script: Mapping[str, Any]) -> None:
        """Take in `{"scenarios": {name: scenario}, "default": scenario | null}`."""
        for name, scenario in script.get("scenarios", {}).items():
            self.scenarios[name] = Scenario(**scenario)
        if "default" in script:
            self.default = Scenario(**script["default"]) if script["default"] else None

    def _event(self, name: str) -> asyncio.Event:
        return self._released.setdefault(name, asyncio.Event())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._connections += 1
        number = self._connections
        try:
            while (request := await self._receive(reader, number)) is not None:
                if not await self._reply(request, reader, writer):
                    break
        except (ConnectionError, _Cut, asyncio.CancelledError):
            # Cancelled only by our own end; passed on, asyncio would log it as an error.
            writer.transport.abort()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _receive(self, reader: asyncio.StreamReader, connection: int) -> Received | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.IncompleteReadError:
            return None
        method, path, _ = head[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = raw.decode("utf-8", "replace")
        return Received(method, path, headers, body, self._now(), connection)

    async def _reply(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer it; whether the connection can be used again."""
        path = request.path.partition("?")[0]
        if path.startswith("/_"):
            return await self._play(_json(200, self._control(request.method, path, request.body)), request, writer)
        self.requests.append(request)
        if path.endswith("/models") and self.listing:
            listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
            return await self._play(_json(200, listed), request, writer)
        if not path.endswith("/chat/completions"):
            return await self._play(refusal(404, f"Unknown address {path}"), request, writer)
        playing = asyncio.ensure_future(self._play(self._choose(request), request, writer))
        # A client sends nothing while it is answered, so whatever can be read is its end.
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({playing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not playing.done():
                request.disconnected_at = self._now()
                return False
            try:
                return playing.result()
            except ConnectionError:
                request.disconnected_at = self._now()
                raise
        finally:
            for task in (playing, leaving):
                task.cancel()
            await asyncio.gather(playing, leaving, return_exceptions=True)

    def _choose(self, request: Received) -> Scenario:
        question = request.question
        for name in self.unsupported:
            if name in request.body:
                request.scenario = f"unsupported {name}"
                return refusal(400, f"Unsupported parameter: '{name}'.", param=name, code="unsupported_parameter")
        marked = re.search(r"\[\[scenario:([\w-]+)\]\]", question)
        name = marked[1] if marked else str(request.body.get("model"))
        if marked and name not in self.scenarios:
            request.scenario = "unknown"
            return refusal(400, f"There is no scenario {name}. There are: {', '.join(sorted(self.scenarios))}")
        scenario = self.scenarios.get(name)
        if scenario is not None and scenario.times is not None:
            self._used[name, question] += 1
            if self._used[name, question] > scenario.times:
                scenario, name = None, f"after {name}"
        request.scenario = name if scenario is not None or name.startswith("after") else "default"
        return scenario or self.default or Scenario([{"words": None}])

    def _control(self, method: str, path: str, body: Any) -> Any:
        if path == "/_requests":
            return [asdict(request) for request in self.requests]
        if path == "/_script" and method == "POST":
            self.load(body)
        elif path.startswith("/_release/") and method == "POST":
            self.release(path.removeprefix("/_release/"))
        elif path == "/_reset" and method == "POST":
            self.reset()
        else:
            return {"error": "GET /_requests, POST /_script, /_release/<name>, /_reset"}
        return {"ok": True}

    async def _play(self, scenario: Scenario, request: Received, writer: asyncio.StreamWriter) -> bool:
        for step in scenario.before:
            await self._pause(step)
        headers = {"content-type": "text/event-stream", **{k.lower(): v for k, v in scenario.headers.items()}}
        headers["transfer-encoding" if scenario.framed else "connection"] = "chunked" if scenario.framed else "close"
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {scenario.status} Scripted\r\n{head}\r\n".encode("latin-1"))
        await writer.drain()
        for step in scenario.steps:
            if {"sleep", "wait", "hang", "cut"} & step.keys():
                await self._pause(step)
                continue
            for data, delay in self._bytes_of(step, request):
                await self._write(data, scenario, request, writer)
                # Also a pause of nothing lets the bytes go out by themselves.
                await asyncio.sleep(delay)
        request.finished_at = self._now()
        if scenario.framed:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return scenario.framed

    async def _write(self, data: bytes, scenario: Scenario, request: Received, writer: asyncio.StreamWriter) -> None:
        if scenario.cut_after is not None:
            data = data[: scenario.cut_after - request.sent]
        if data:
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if scenario.framed else data)
            request.sent += len(data)
            await writer.drain()
        if scenario.cut_after is not None and request.sent >= scenario.cut_after:
            raise _Cut

    async def _pause(self, step: Step) -> None:
        if "sleep" in step:
            await asyncio.sleep(step["sleep"])
        elif "wait" in step:
            await self._event(step["wait"]).wait()
        elif "hang" in step:
            await asyncio.Event().wait()
        else:
            # Let what was written go out first: a reset throws away what is still in the buffers.
            await asyncio.sleep(0.02)
            raise _Cut

    def _bytes_of(self, step: Step, request: Received) -> Iterable[tuple[bytes, float]]:
        """What a step sends, and how long to wait after each piece."""
        match step:
            case {"send": text}:
                yield text.encode(), 0
            case {"send_b64": text}:
                yield base64.b64decode(text), 0
            case {"chunk": body}:
                yield frame(body), 0
            case {"done": _}:
                yield frame("[DONE]"), 0
            case {"drip": text}:
                data, size = text.encode(), step.get("size", 1)
                for start in range(0, len(data), size):
                    yield data[start : start + size], step.get("delay", 0)
            case {"words": count}:
                yield from self._words(request, count, step.get("rate"))
            case _:
                raise ValueError(f"unknown step {step!r}")

    def _words(self, request: Received, count: int | None, rate: float | None) -> Iterable[tuple[bytes, float]]:
        question = request.question
        asked = dict(re.findall(r"\[\[(words|rate):(\d+)\]\]", question))
        count = int(asked.get("words", self.words if count is None else count))
        rate = float(asked.get("rate", self.rate if rate is None else rate))
        yield frame(chunk("", role="assistant")), 0
        for piece in pieces(answer(question, count)):
            yield frame(chunk(piece)), 1 / rate if rate else 0
        yield frame(chunk(finish="stop")), 0
        if (request.body.get("stream_options") or {}).get("include_usage"):
            yield frame(chunk(choices=False, usage=(len(question) // 4 + 1, count))), 0
        yield frame("[DONE]"), 0


def _json(status: int, body: Any) -> Scenario:
    return Scenario([{"send": json.dumps(body)}], status=status, headers={"content-type": "application/json"})


async def _main(arguments: argparse.Namespace) -> None:
    server = OpenAIServer(words=arguments.words, rate=arguments.rate, port=arguments.port, host=arguments.host)
    if arguments.script:
        server.load(json.loads(arguments.script.read_text()))
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with server:
        print(server.base_url, flush=True)
        await ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted OpenAI-compatible server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--words", type=int, default=40, help="words of the default answer")
    parser.add_argument("--rate", type=float, default=50, help="words a second of the default answer; 0: no pause")
    parser.add_argument("--script", type=Path, help="JSON file with scenarios")
    sys.exit(asyncio.run(_main(parser.parse_args())))


if __name__ == "__main__":
    main()
