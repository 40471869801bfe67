from __future__ import annotations

import sys

from headwater.threads import SWITCH_INTERVAL, take_turns


def test_threads_wait_for_each_other_for_less_than_python_would_let_them() -> None:
    before = sys.getswitchinterval()
    try:
        take_turns()
        assert sys.getswitchinterval() == SWITCH_INTERVAL < before
    finally:
        sys.setswitchinterval(before)
