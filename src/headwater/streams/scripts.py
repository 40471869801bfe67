"""The Lua scripts beside this file, each with its keys and arguments on top, called by their hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

Command = tuple[Any, ...]


class Script:
    def __init__(self, name: str, keys_: int) -> None:
        self.text = Path(__file__).with_name(f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()
        self._keys = keys_

    def __call__(self, *keys_and_arguments: Any) -> Command:
        return ("EVALSHA", self.sha, self._keys, *keys_and_arguments)


class Scripts:
    def __init__(self) -> None:
        self.open = Script("open", 3)
        self.claim = Script("claim", 3)
        self.append = Script("append", 3)
        self.push = Script("push", 2)
        self.restore = Script("restore", 3)
        self.renew = Script("renew", 3)
        self.release = Script("release", 1)
        self.cancel = Script("cancel", 2)
        self.read = Script("read", 2)
        self.pack = Script("pack", 2)
        self.schedule = Script("schedule", 1)
        self.due = Script("due", 1)
        self.mend = Script("mend", 4)

    def all(self) -> list[Script]:
        return list(vars(self).values())
