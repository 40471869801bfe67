"""Threads of one process, and Python's lock between them.

Work goes from hand to hand here: from the event loop to the journal's threads and back, to the thread that talks to the
broker, from Celery's thread to the pool's. Each time the next thread may have to wait until the one that computes lets
go of the interpreter, which it does of its own accord only where it waits for something.
"""

from __future__ import annotations

import sys
from typing import Final

#: Seconds after which a thread that computes lets another one go on. Python's own 5 ms are several times what a step
#: takes; with sixty chats at once a first token comes a quarter earlier than with it, for the same work.
SWITCH_INTERVAL: Final = 0.0005


def take_turns() -> None:
    """Let the threads of this process wait for each other for less long. For processes that are ours alone."""
    sys.setswitchinterval(SWITCH_INTERVAL)
