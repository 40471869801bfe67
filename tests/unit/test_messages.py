"""Chats, messages, titles and branches."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.messages import TITLE_LENGTH, Chat, Message, MessageStatus, Role, branch, title_of


def message(name: str, parent: str | None) -> Message:
    return Message(name, "chat", "local", Role.USER, name, 1, parent_id=parent)


def names(messages: list[Message]) -> list[str]:
    return [one.id for one in messages]


TREE = {
    one.id: one
    for one in (
        message("root", None),
        message("left", "root"),
        message("right", "root"),
        message("leaf", "right"),
        message("orphan", "gone"),
    )
}


def test_a_branch_is_the_path_from_the_root_to_the_leaf() -> None:
    assert names(branch(TREE, "leaf")) == ["root", "right", "leaf"]
    assert names(branch(TREE, "left")) == ["root", "left"]


def test_a_branch_of_nothing_is_empty() -> None:
    assert branch(TREE, None) == []
    assert branch(TREE, "unknown") == []


def test_a_branch_stops_where_a_parent_is_missing() -> None:
    assert names(branch(TREE, "orphan")) == ["orphan"]


def test_a_branch_of_a_circle_ends() -> None:
    circle = {"a": message("a", "b"), "b": message("b", "a")}
    assert names(branch(circle, "a")) == ["b", "a"]


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("What is a fjord?", "What is a fjord?"),
        ("\n\n  First line  \nsecond line", "First line"),
        ("# A heading\nwith text", "A heading"),
        ("> - quoted   and    wide", "quoted and wide"),
        ("", "New chat"),
        ("   \n\t", "New chat"),
        ("###", "New chat"),
        ("a" * TITLE_LENGTH, "a" * TITLE_LENGTH),
        ("a" * (TITLE_LENGTH + 1), "a" * TITLE_LENGTH + "…"),
        ("word, " * 20, "word, word, word, word, word, word, word, word, word, word…"),
    ],
)
def test_a_title_is_the_first_line_cut_at_a_word(question: str, title: str) -> None:
    assert title_of(question) == title


@given(st.text(max_size=300))
def test_every_title_is_one_short_line(question: str) -> None:
    title = title_of(question)
    assert title
    assert len(title) <= TITLE_LENGTH + 1
    assert len(title.splitlines()) == 1


def test_a_chat_survives_its_json_form() -> None:
    chat = Chat("id", "local", 1, 2, "A title", 3)
    assert Chat.from_json(orjson.loads(orjson.dumps(chat.to_json()))) == chat


def test_a_message_survives_its_json_form() -> None:
    full = Message(
        "id",
        "chat",
        "local",
        Role.ASSISTANT,
        "text",
        5,
        status=MessageStatus.FAILED,
        parent_id="parent",
        reasoning="because",
        run_id="run",
        model="a model",
        usage={"total_tokens": 3},
        error={"code": "deadline", "message": "too long"},
        version=6,
    )
    back = Message.from_json(orjson.loads(orjson.dumps(full.to_json())))
    assert back == full
    assert isinstance(back.role, Role)
    assert isinstance(back.status, MessageStatus)


def test_members_of_a_later_version_are_ignored() -> None:
    chat = Chat("id", "local", 1, 2)
    text = message("m", None)
    assert Chat.from_json({**chat.to_json(), "colour": "blue"}) == chat
    assert Message.from_json({**text.to_json(), "colour": "blue"}) == text
