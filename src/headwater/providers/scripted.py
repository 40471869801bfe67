"""ScriptedProvider: a model that says what a script tells it to. The demo model is one; tests write others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

from headwater.providers.base import ChatRequest, Delta, Provider

#: What happens next: say something, wait so many seconds, wait for an event, or fail.
Step = Delta | float | asyncio.Event | Exception
#: The steps of one answer. Called once per request.
Script = Callable[[ChatRequest], Iterable[Step]]


class ScriptedProvider(Provider):
    """Plays a script for each request.

    A script may be a generator function: it is advanced step by step, so it can look at what has
    happened since.
    """

    def __init__(
        self,
        script: Script,
        *,
        model: str = "scripted",
        demo: bool = False,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.model = model
        self.demo = demo
        #: Answers under way now.
        self.streaming = 0
        self._script = script
        self._sleep = sleep

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        self.streaming += 1
        try:
            for step in self._script(request):
                match step:
                    case Delta():
                        yield step
                    case asyncio.Event():
                        await step.wait()
                    case Exception():
                        raise step
                    case _:
                        await self._sleep(step)
        finally:
            self.streaming -= 1

    async def check(self) -> str:
        if self.demo:
            return "The built-in demo model answers. Set OPENAI_API_KEY (and OPENAI_BASE_URL) for a real one."
        return f"The scripted model “{self.model}” answers."

    async def close(self) -> None:
        """Nothing is held."""


def demo(pace: float = 32.0) -> ScriptedProvider:
    """The model that answers when no API is set, at `pace` words per second.

    It says that it is a demo and how to set a key. These words in the question steer it:

    ========= ==========================================
    `short`   one sentence
    `long`    about a minute at the usual pace
    `table`   a table as well
    `code`    a longer piece of code
    `think`   much reasoning first
    `error`   breaks off in the middle with an error
    ========= ==========================================

    The same question gets the same answer.
    """
    from headwater.providers.demo import DEMO_MODEL, script

    return ScriptedProvider(lambda request: script(request, pace), model=DEMO_MODEL, demo=True)
