"""What the demo model says. Pure: a question and a pace become the steps of an answer."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Final

from headwater.errors import ProviderError
from headwater.providers.base import ChatRequest, Delta

DEMO_MODEL: Final = "headwater-demo"

#: Characters of the question that are quoted back.
_QUOTED: Final = 200
#: Paragraphs of a long answer; at 32 words a second they take about a minute.
_LONG: Final = 28

_PIECES = re.compile(r"\s*\S+")

_THOUGHTS: Final = (
    "The question is “{question}”. ",
    "I am a demo and know nothing, so the honest answer is to say so. ",
    "I can still show what an answer looks like: text, a list and code. ",
)

_MORE_THOUGHTS: Final = (
    "Thinking of nothing takes time as well. ",
    "First I look at the question from the left, then from the right. ",
    "There is no model behind me, so both views are the same. ",
    "A real model would weigh several answers here and drop most of them. ",
    "This text is folded away in the page and kept with the message. ",
)

_OPENING: Final = (
    "**This is the built-in demo model.** No model's API is set, so this text comes from a script and "
    "knows nothing about your question:\n\n> {question}\n\n"
)

_LIST: Final = (
    "It still travels the real way:\n\n"
    "- a Celery worker makes these words and numbers them,\n"
    "- Redis keeps them and hands them on,\n"
    "- your browser shows them as they come. Refresh the page in the middle: nothing is lost.\n\n"
)

_SETUP: Final = (
    "To talk to a real model, stop headwater, set a key and start it again:\n\n"
    "```sh\n"
    "export OPENAI_API_KEY=your-key\n"
    "# for any other API that speaks OpenAI's language, also a local one:\n"
    "export OPENAI_BASE_URL=http://127.0.0.1:8080/v1\n"
    "headwater up\n"
    "```\n\n"
)

_STEER: Final = (
    "Some words in a question steer this demo: `short`, `long` (about a minute), `table`, `code`, `think`, "
    "and `error`, which breaks off in the middle."
)

_TABLE: Final = (
    "A table, as you asked:\n\n"
    "| part | does | kept |\n"
    "|:-----|:-----|-----:|\n"
    "| worker | makes the words | no |\n"
    "| Redis | hands them on | an hour |\n"
    "| PostgreSQL | keeps the conversation | for good |\n\n"
)

_CODE: Final = (
    "Code, as you asked:\n\n"
    "```python\n"
    "from collections.abc import Iterator\n\n\n"
    "def fibonacci(limit: int) -> Iterator[int]:\n"
    '    """The Fibonacci numbers below `limit`."""\n'
    "    a, b = 0, 1\n"
    "    while a < limit:\n"
    "        yield a\n"
    "        a, b = b, a + b\n\n\n"
    "print(*fibonacci(1_000))  # <b>not bold</b> & not a tag\n"
    "```\n\n"
)

_SENTENCES: Final = (
    "A river begins where the first drop decides on a direction.",
    "Every word of this answer has a number, and the numbers have no holes.",
    "If you close the page now, the worker goes on; come back and read the rest.",
    "The stop button ends it, and what was said until then stays.",
    "Open a second window: both show the same words at the same time.",
    "Nothing here is random: the same question gets the same answer.",
    "Water that is held back for a while arrives later, but it arrives.",
    "Two streams that meet keep their drops in order.",
    "A dam that breaks is built again, and the river goes on from where it was.",
    "The sea keeps what the river brought.",
)


def script(request: ChatRequest, pace: float) -> Iterator[Delta | float | ProviderError]:
    """The steps of the answer, `pace` words a second."""
    question = _question(request)
    words = set(re.findall(r"[a-z]+", question.lower()))
    # Seeded by the question: uneven like a model's pace, and the same every time.
    chance = random.Random(question)
    thoughts = "".join(_THOUGHTS) + ("".join(_MORE_THOUGHTS) * 4 if "think" in words else "")
    text = _answer(question, words, chance)
    reasoning_pieces = _PIECES.findall(thoughts.replace("{question}", _quote(question)))
    content_pieces = _PIECES.findall(text)
    breaks_at = len(content_pieces) // 2 if "error" in words else None

    for piece in reasoning_pieces:
        yield Delta(reasoning=piece)
        yield chance.uniform(0.4, 1.6) / pace
    for number, piece in enumerate(content_pieces):
        if number == breaks_at:
            yield ProviderError(
                "The demo model broke off, because the question has the word “error” in it. Ask without it.",
                code="provider_cut",
                retryable=True,
            )
        yield Delta(content=piece)
        yield chance.uniform(0.4, 1.6) / pace
    prompt = sum(len(str(message.get("content", ""))) for message in request.messages)
    yield Delta(
        usage=(-(-prompt // 4), len(reasoning_pieces) + len(content_pieces)),
        finish_reason="stop",
    )


def _question(request: ChatRequest) -> str:
    for message in reversed(request.messages):
        if message.get("role") == "user":
            return str(message.get("content", ""))
    return ""


def _quote(question: str) -> str:
    line = " ".join(question.split())
    return line if len(line) <= _QUOTED else line[: _QUOTED - 1] + "…"


def _answer(question: str, words: set[str], chance: random.Random) -> str:
    quoted = _quote(question)
    if "short" in words:
        return f"This is the built-in demo model; set OPENAI_API_KEY for a real answer to “{quoted}”."
    parts = [_OPENING.replace("{question}", quoted), _LIST, _SETUP]
    if "table" in words:
        parts.append(_TABLE)
    if "code" in words:
        parts.append(_CODE)
    if "long" in words:
        for number in range(1, _LONG + 1):
            sentences = " ".join(chance.sample(_SENTENCES, 5))
            parts.append(f"{'#' * 3} Part {number} of {_LONG}\n\n{sentences}\n\n")
    parts.append(_STEER)
    return "".join(parts)
