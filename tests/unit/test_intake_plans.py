"""What a turn plans from the messages at hand, which may be a part of the chat."""

from __future__ import annotations

from typing import Any, cast

import pytest

from headwater.access import LOCAL_OWNER, Caller
from headwater.clock import FrozenClock
from headwater.errors import StoreUnavailable
from headwater.ids import new_id
from headwater.intake.parts import Parts
from headwater.intake.plans import Ask, Planner
from headwater.messages import Chat, Message, Role
from headwater.settings import WhenBusy


@pytest.mark.parametrize("complete", [False, True], ids=["by the journal", "by the rows"])
async def test_an_answer_whose_question_is_not_at_hand_cannot_be_made_again_now(complete: bool) -> None:
    chat = Chat(new_id(), LOCAL_OWNER, 1, 1)
    # Its question stands in another host's journal.
    answer = Message(new_id(), chat.id, LOCAL_OWNER, Role.ASSISTANT, "Hello", 2, parent_id=new_id())
    ask = Ask(Caller(LOCAL_OWNER), chat.id, None, answer.id, None, "", WhenBusy.REJECT)

    class OnlyAClock:
        clock = FrozenClock()

    planner = Planner(cast("Parts", cast("Any", OnlyAClock())))
    with pytest.raises(StoreUnavailable, match="Try again in a moment"):
        await planner.plan(ask, chat, {answer.id: answer}, complete=complete)
