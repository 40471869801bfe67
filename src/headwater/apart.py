"""Apart: one run's trouble, in a look at many, keeps none of the others waiting."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Container
from typing import TypeVar

from headwater.errors import LogUnavailable, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Apart:
    """Does for one run at a time what a look at many asks for; `doing` is the word for that, as in "cannot be swept".

    A run's trouble is told once, until it is `forgotten`.
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._told: set[str] = set()

    async def __call__(self, run_id: str, work: Awaitable[T]) -> T | None:
        """What the work comes to; None when it fails. Raises LogUnavailable: without Redis all the others fail too."""
        try:
            return await work
        except LogUnavailable:
            raise
        except Unavailable as error:
            if run_id not in self._told:
                logger.warning("Run %s cannot be %s now: %s", run_id, self._doing, error)
        except Exception:
            if run_id not in self._told:
                logger.exception("Run %s cannot be %s", run_id, self._doing)
        self._told.add(run_id)
        return None

    def forget(self, *, but: Container[str] = ()) -> None:
        """Tell the trouble of all runs `but` these again, should it come again."""
        self._told = {run_id for run_id in self._told if run_id in but}
