"""Absence: what it means that nobody knows an id.

Each host has a journal of its own. What another host accepted is known here by Redis's log and by
PostgreSQL's row; while Redis has lost the one and PostgreSQL has not got the other yet, it is unknown
here and exists. Whoever is told NotFound does not come back, so that is said of what can no longer be
on its way. Until then it is NotKnownYet.

What somebody here knows is not asked about: a stranger's is NotFound at once, and so is a deleted chat,
whose tombstone PostgreSQL keeps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from headwater.clock import Clock
from headwater.errors import NotFound, NotKnownYet
from headwater.ids import is_of_key, made_at
from headwater.store import Store

#: Seconds that what was accepted at another host may be unknown here while PostgreSQL answers. Its syncer tries again
#: after 10 s at most; a log that Redis lost is written again by its worker at its next renewal, or announced by the
#: sweeper 15 s after the run was made or at its next look, 10 s later; and that PostgreSQL was away for less than
#: 10 s, a sweeper's pause, may go unnoticed here. Twice 10 s and 25 s make 45; the rest is for clocks that differ, and
#: for leases and graces longer than the defaults.
ON_ITS_WAY: Final = 60.0
#: Ids without a time that are remembered as asked for. One that was forgotten counts as asked for the first time.
REMEMBERED: Final = 1_000


class Absence:
    """Tells what does not exist from what may be on its way. One for all of a process."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        #: When an id that tells no time was asked for first, the latest at the end.
        self._asked: OrderedDict[str, float] = OrderedDict()

    def may_come(self, thing_id: str) -> bool:
        """Whether a run or message that nobody knows may still be on its way: it is young, or PostgreSQL was away."""
        made = made_at(thing_id)
        if made is None:
            return False
        age = (self._clock.now_ms() - made) / 1000
        if age >= ON_ITS_WAY:
            # However old it is: for as long as PostgreSQL was away, nobody could bring it there.
            lost_at = self._store.lost_at
            return lost_at is not None and self._clock.monotonic() - lost_at < ON_ITS_WAY
        # Another host's clock may be ahead of ours, but not by much.
        return age > -ON_ITS_WAY

    def chat_may_come(self, chat_id: str) -> bool:
        """`may_come` for a chat: one whose id was made from a key is young when it is first asked for."""
        if not is_of_key(chat_id):
            return self.may_come(chat_id)
        now = self._clock.monotonic()
        first = self._asked.setdefault(chat_id, now)
        if len(self._asked) > REMEMBERED:
            self._asked.popitem(last=False)
        return now - first < ON_ITS_WAY

    def of(self, thing_id: str, what: str) -> NotFound | NotKnownYet:
        """The error for a run or message that neither log nor journal nor store knows; `what` is its noun."""
        return _not_known_yet(what) if self.may_come(thing_id) else NotFound(f"There is no such {what}.")

    @asynccontextmanager
    async def doubted(self, chat_id: str) -> AsyncIterator[None]:
        """Turns NotFound into NotKnownYet where the chat may be on its way. Raises StoreUnavailable."""
        try:
            yield
        except NotFound:
            if self.chat_may_come(chat_id) and not await self._store.chats.exists(chat_id):
                raise _not_known_yet("chat") from None
            raise


def _not_known_yet(what: str) -> NotKnownYet:
    return NotKnownYet(
        f"Nobody here knows this {what} yet. If it was accepted a moment ago, it is on its way: ask again."
    )
