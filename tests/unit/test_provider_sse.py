"""The SSE parser: exact however the stream is cut, and bounded."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.providers.sse import FrameTooLarge, SseParser


def parse(*chunks: bytes, max_frame: int = 1 << 20) -> list[bytes]:
    parser = SseParser(max_frame)
    payloads = [payload for chunk in chunks for payload in parser.feed(chunk)]
    last = parser.end()
    return payloads if last is None else [*payloads, last]


def expected(stream: bytes) -> list[bytes]:
    """The standard's algorithm over a whole stream, written for clarity; a last open frame counts."""
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    payloads: list[bytes] = []
    data: list[bytes] = []
    for line in [*text.split(b"\n"), b""]:
        if not line:
            if data:
                payloads.append(b"\n".join(data))
            data = []
        elif line == b"data" or line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
    return payloads


AWKWARD = {
    "usual": b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n',
    "crlf": b'data: {"a":1}\r\n\r\ndata: {"b":2}\r\n\r\n',
    "cr": b'data: {"a":1}\r\rdata: {"b":2}\r\r',
    "mixed line ends": b"data: 1\r\n\ndata: 2\n\r\ndata: 3\r\r\ndata: 4\r\n\r",
    "comments": b": hello\n\ndata: 1\n: in between\ndata: 2\n\n:\n\n",
    "several data lines": b"data: {\ndata:  1\ndata:}\n\n",
    "several data lines with crlf": b"data: 1\r\ndata: 2\r\n\r\n",
    "byte order mark": b"\xef\xbb\xbfdata: 1\n\n",
    "half a byte order mark": b"\xef\xbbdata: 1\n\ndata: 2\n\n",
    "wide characters": 'data: {"a":"日本語 🌊 é"}\n\n'.encode(),
    "no blank line at the end": b"data: 1\n\ndata: 2\n",
    "no line end at the end": b"data: 1\n\ndata: 2",
    "other fields": b"event: x\nid: 1\nretry: 5\ndata: 1\n\nevent: y\n\ndatabase: no\n\n",
    "no space and two spaces": b"data:1\n\ndata:  2\n\n",
    "empty data": b"data:\n\ndata\n\ndata: \n\n",
    "many blank lines": b"\n\n\n\ndata: 1\n\n\n\n\ndata: 2\n\n\n",
    "other line separators are text": "data: a\x0bb\x0cc\x1cd\x85e\u2028f\n\n".encode(),
    "nothing": b"",
    "only a mark": b"\xef\xbb\xbf",
}


@pytest.mark.parametrize("stream", AWKWARD.values(), ids=AWKWARD.keys())
def test_an_awkward_stream_reads_the_same_whole_byte_by_byte_and_cut_in_two_anywhere(stream: bytes) -> None:
    payloads = expected(stream)

    assert parse(stream) == payloads
    assert parse(*(stream[i : i + 1] for i in range(len(stream)))) == payloads
    for cut in range(len(stream) + 1):
        assert parse(stream[:cut], stream[cut:]) == payloads, cut


lines = st.sampled_from(
    [
        b"data: {}",
        b"data:x",
        b"data",
        b"data:  y",
        b": ping",
        b"event: e",
        b"",
        b"",
        b"",
        "data: 日🌊".encode(),
        b"datum: 1",
    ]
)
ends = st.sampled_from([b"\n", b"\r", b"\r\n"])


@given(st.lists(st.tuples(lines, ends), max_size=30), st.lists(st.integers(0, 400), max_size=12), st.booleans())
def test_any_stream_cut_anywhere_reads_as_the_standard_says(
    parts: list[tuple[bytes, bytes]], cuts: list[int], mark: bool
) -> None:
    stream = (b"\xef\xbb\xbf" if mark else b"") + b"".join(line + end for line, end in parts)
    points = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})

    assert parse(*(stream[a:b] for a, b in pairwise(points))) == expected(stream)


def test_a_payload_is_given_as_soon_as_its_frame_ends() -> None:
    parser = SseParser()

    assert parser.feed(b"data: 1\r") == []
    # The CR ends the blank line; the LF that may follow changes nothing.
    assert parser.feed(b"\n\r") == [b"1"]
    assert parser.feed(b"\ndata: 2\n\nda") == [b"2"]
    assert parser.feed(b"ta: 3\n") == []
    assert parser.feed(b"\n") == [b"3"]


@pytest.mark.parametrize(
    "stream",
    [b"data: " + b"x" * 2000, b"data: 12345678\n" * 200, b": " + b"x" * 2000, b"data:\n" * 2000],
    ids=["one line", "many lines", "a comment", "empty lines"],
)
@pytest.mark.parametrize("size", [1, 100, 100_000])
def test_a_frame_without_end_is_refused_at_the_limit(stream: bytes, size: int) -> None:
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]

    with pytest.raises(FrameTooLarge):
        parse(*pieces, max_frame=1000)


def test_the_limit_is_for_each_frame_and_not_for_the_stream() -> None:
    frame = b"data: " + b"x" * 900 + b"\n\n"

    assert len(parse(*(frame[i : i + 7] for _ in range(50) for i in range(0, len(frame), 7)), max_frame=1000)) == 50


def test_a_huge_frame_in_many_pieces_is_read() -> None:
    payload = b"x" * 3_000_000
    stream = b"data: " + payload + b"\n\n"

    assert parse(*(stream[i : i + 1000] for i in range(0, len(stream), 1000)), max_frame=4_000_000) == [payload]
