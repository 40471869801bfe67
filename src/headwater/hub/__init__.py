"""Hub: one subscription connection per process, many readers.

The log is the truth and the feed is the push. A reader is live while what is pushed continues
where it stands; whatever else happens, it is *behind* and reads the log from its position on. So
there is one way to catch up, and joining, a hole, a connection made again, a reader too slow for
its buffer and a long silence are only reasons to take it.

A reader registers before anything is awaited, the log is read after the feed has confirmed, and
both are merged by seq: between the two nothing can slip through.
"""

from __future__ import annotations

from headwater.hub.hub import History, Hub
from headwater.hub.subscription import Subscription
from headwater.streams.batch import Batch

__all__ = ["Batch", "History", "Hub", "Subscription"]
