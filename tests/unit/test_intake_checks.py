"""What intake takes and refuses, without any effect."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import InvalidInput
from headwater.ids import is_id
from headwater.intake import checks
from headwater.messages import Chat, Message, Role
from headwater.overlay import Facts, newer_chat
from headwater.records import Record


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200))
def test_a_text_is_taken_as_it_is_or_refused(text: str) -> None:
    if text.strip() and len(text) <= 100:
        assert checks.checked_text(text, 100) == text
    else:
        with pytest.raises(InvalidInput):
            checks.checked_text(text, 100)


@pytest.mark.parametrize("text", ["a\0", "\ud800", "x\udfff"])
def test_text_that_no_database_keeps_is_refused_by_the_name_of_its_field(text: str) -> None:
    with pytest.raises(InvalidInput, match="content"):
        checks.checked_text(text, 100)
    with pytest.raises(InvalidInput, match="title"):
        checks.checked_title(text)
    with pytest.raises(InvalidInput, match="Idempotency-Key"):
        checks.checked_key(text)


@pytest.mark.parametrize("key", ["", " ", "a b", "clé", "a\n", "\x7f", "k" * 256])
def test_a_key_that_is_not_visible_ascii_is_refused(key: str) -> None:
    with pytest.raises(InvalidInput, match="Idempotency-Key"):
        checks.checked_key(key)


@pytest.mark.parametrize("key", [None, "!", "~" * 255, "0198c0de-7abc-7def-8123-456789abcdef"])
def test_a_key_of_visible_ascii_is_taken_as_it_is(key: str | None) -> None:
    assert checks.checked_key(key) == key


def test_a_question_sorts_right_before_its_answer_and_is_known_from_it() -> None:
    pairs = [checks.id_pair() for _ in range(200)]
    for question, answer in pairs:
        assert is_id(question)
        assert is_id(answer)
        assert question < answer
        assert checks.question_of(answer) == question
        assert uuid.UUID(question).version == uuid.UUID(answer).version == 7
    assert len({one for pair in pairs for one in pair}) == 400


def test_the_fingerprint_tells_requests_apart() -> None:
    asked = [
        checks.fingerprint("send", chat_id="c", content="t", parent_id=None),
        checks.fingerprint("send", chat_id="c", content="t", parent_id=""),
        checks.fingerprint("send", chat_id="c", content="u", parent_id=None),
        checks.fingerprint("send", chat_id="d", content="t", parent_id=None),
        checks.fingerprint("regenerate", chat_id="c", content="t", parent_id=None),
    ]
    assert len(set(asked)) == len(asked)
    assert asked[0] == checks.fingerprint("send", parent_id=None, content="t", chat_id="c")


def test_the_id_of_a_key_is_the_owners_own() -> None:
    assert checks.id_of_key("a", "k") == checks.id_of_key("a", "k")
    assert len({checks.id_of_key("a", "k"), checks.id_of_key("a", "l"), checks.id_of_key("b", "k")}) == 3
    assert is_id(checks.id_of_key("a", "k"))
    assert uuid.UUID(checks.id_of_key("a", "k")).version == 8


def message(version: int, content: str, at: int = 5) -> Message:
    return Message("m", "c", "local", Role.ASSISTANT, content, at, version=version)


def test_of_several_records_of_a_row_the_highest_version_counts() -> None:
    records = [Record.of(message(version, str(version))) for version in (4, 6, 2)]
    assert Facts.of(records).messages["m"].content == "6"


def test_a_chat_is_as_recent_as_its_newest_message() -> None:
    chat = Chat("c", "local", 1, 1, "T")
    assert Facts.of([Record.of(chat), Record.of(message(0, "", at=9))]).chats["c"].updated_at == 9


def test_a_chat_of_which_only_messages_are_known_still_has_its_owner() -> None:
    known = Facts.of([Record.of(message(0, "", at=9))])
    assert known.chat("c") == Chat("c", "local", 9, 9, None, 0)
    assert known.chat("other") is None


def test_a_title_once_given_stays() -> None:
    named, touched = Chat("c", "local", 1, 1, "T", 2), Chat("c", "local", 1, 9, None, 3)
    for one, other in ((named, touched), (touched, named)):
        assert newer_chat(one, other) == Chat("c", "local", 1, 9, "T", 3)
