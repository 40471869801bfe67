"""Format: a pure, deterministic projection of a run's events into someone's wire format.

The bytes depend on the events alone: not on the clock, the server or the reader. So a reader that
comes back to another server after a restart goes on exactly where it was, and many readers of one
run share one encoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from headwater.hub import Batch


class Format(ABC):
    """Batches of one run, in order, become bytes."""

    #: Names the encoding where it is cached: two formats that write different bytes differ in it.
    name: ClassVar[str]
    #: The bytes of a batch follow from that batch alone, so one encoding serves every reader.
    #: A format that must know what came before sets it to False and is made anew for each reader.
    shared: ClassVar[bool] = True

    @abstractmethod
    def frames(self, batch: Batch) -> bytes:
        """The batch on the wire; empty for a batch without events that does not reset."""

    def render(self, batch: Batch) -> bytes:
        """`frames`, made once per batch where it can be shared."""
        return batch.encoded(self.name, self.frames) if self.shared else self.frames(batch)
