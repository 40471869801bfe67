"""People: they ask one question after another, or while they are being answered, have each answer read in several
ways, and stop some."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import aiohttp
import orjson

from chaos.history import Promise, Reader
from chaos.readers import BROKEN, LATER, TRANSPORTS, Fleet, Following, World, follow, refused
from support.openai_scenarios import answer


class Person:
    """Asks one question after another, has each answer read in several ways, and stops some."""

    def __init__(self, world: World, number: int, seed: int) -> None:
        self._world = world
        self._name = f"client{number}"
        self._seed = seed
        self._chance = random.Random(f"{seed}-{number}")
        self._numbers = itertools.count(1)
        self._fleet = Fleet(world, self._name)

    async def live(self) -> None:
        """Until the harness closes."""
        self._world.spawn(self._fleet.read(random.Random(self._chance.random())))
        try:
            await self._talk()
        finally:
            self._fleet.complete.set()

    async def _talk(self) -> None:
        world, chance = self._world, self._chance
        chat_id: str | None = None
        #: The promise of which another answer is wanted.
        again: Promise | None = None
        while not world.closing.is_set():
            if chat_id is None or (again is None and chance.random() < 0.3):
                chat_id = await self._new_chat()
            if chat_id is None:
                return
            promise = await self._ask(chat_id, again)
            if promise is None:
                return
            first = self._have_it_read(promise)
            while again is None and chance.random() < 0.15:
                # Does not wait for the answer and asks on.
                follow_up = await self._ask(chat_id, None, chance.choice(("enqueue", "interrupt")))
                if follow_up is None:
                    return
                promise, first = follow_up, self._have_it_read(follow_up)
            if chance.random() < 0.15:
                world.spawn(self._stop(promise.run_id, chance.uniform(0, 3)))
            if chance.random() < 0.2:
                # Does not wait for the answer and opens another chat meanwhile.
                chat_id = None
            while chat_id is not None and not first.finished and not world.closing.is_set():
                await world.pause(0.05)
            again = promise if chat_id is not None and chance.random() < 0.2 else None
            await world.pause(chance.uniform(0, 1))

    def _have_it_read(self, promise: Promise) -> Reader:
        chance, world = self._chance, self._world
        readers = []
        delays = [0.0, *(chance.choice((0.0, 0.5, 3.0, world.late)) for _ in range(chance.randrange(0, 3)))]
        for index, delay in enumerate(delays):
            transport = chance.choice(sorted(TRANSPORTS))
            reader = Reader(f"{self._name}-{promise.run_id[-6:]}-{index}", transport, promise.run_id)
            world.history.readers.append(reader)
            world.spawn(follow(Following(reader, world), random.Random(chance.random()), delay))
            readers.append(reader)
        if chance.random() < 0.5:
            self._fleet.add(promise.run_id)
        return readers[0]

    async def _new_chat(self) -> str | None:
        key = f"{self._seed}-{self._name}-chat-{next(self._numbers)}"
        made = await self._insist("/api/chats", {}, key, 201)
        return str(made["id"]) if made is not None else None

    async def _ask(self, chat_id: str, again: Promise | None, when_busy: str = "") -> Promise | None:
        """Ask something new, or for another answer to what was asked before. None when nobody takes it."""
        number, history = next(self._numbers), self._world.history
        question, words = (again.question, 0) if again is not None else self._question(number)
        path, body = f"/api/chats/{chat_id}/messages", {"content": question}
        if again is not None:
            path, body = f"{path}/{again.message_id}/regenerate", {}
        if when_busy:
            body["when_busy"] = when_busy
        stopped = [one.run_id for one in history.promises if one.chat_id == chat_id] if when_busy == "interrupt" else []
        for run_id in stopped:
            history.stopped(run_id)
        key = f"{self._seed}-{self._name}-message-{number}"
        history.unanswered.add(key)
        started = time.monotonic()
        accepted = await self._insist(path, body, key, 202)
        if accepted is None:
            return None
        self._world.accepted_after.append(time.monotonic() - started)
        now = self._world.clock.now_ms()
        # The other host may have taken one of them while PostgreSQL is away, unseen by this one: docs/decisions/0004.
        for run_id in stopped if history.hosts == 1 else ():
            history.stopped(run_id, now)
        promise = Promise(
            run_id=accepted["task_id"],
            chat_id=accepted["chat_id"],
            message_id=accepted["message_id"],
            user_message_id=again.user_message_id if again is not None else accepted["user_message_id"],
            question=question,
            answer=again.answer if again is not None else answer(question, words),
            key=key,
            accepted_at=0 if when_busy else now,
        )
        history.promises.append(promise)
        history.unanswered.discard(key)
        return promise

    def _question(self, number: int) -> tuple[str, int]:
        """Words to ask, and how many the answer has."""
        chance = self._chance
        words = chance.choice((3, 20, 40, 60, 120))
        rate = chance.choice((0, 10, 20, 40))
        # At most twelve seconds of speech, and a long burst now and then.
        words, rate = (min(words, rate * 12), rate) if rate else (words * 20, 0)
        question = f"{self._seed} {self._name} asks number {number} [[words:{words}]] [[rate:{rate}]]"
        return question, words

    async def _insist(self, path: str, body: dict[str, Any], key: str, wanted: int) -> dict[str, Any] | None:
        """Repeat a request under its key, now here and now there, until it is answered. None when it never is."""
        world, last = self._world, "no answer"
        timeout = aiohttp.ClientTimeout(total=10, sock_connect=2)
        while not world.over.is_set():
            base = self._chance.choice(world.endpoints)
            started, began = time.monotonic(), world.clock.now_ms()
            try:
                async with world.http.post(
                    base + path, json=body, headers={"Idempotency-Key": key}, timeout=timeout
                ) as response:
                    said = await response.text()
            except BROKEN as error:
                last = repr(error)
                await world.pause(self._chance.uniform(0.05, 0.5))
                continue
            last = f"{response.status} {said}"
            if response.status == wanted:
                world.requests.append((started, time.monotonic() - started))
                answered: dict[str, Any] = orjson.loads(said)
                return answered
            if response.status == 507:
                world.no_room(began, f"POST {path}", said)
            elif response.status not in LATER | {409}:
                world.complain(f"POST {path}", response.status, said)
                if response.status < 500:
                    return None
            await world.pause(self._chance.uniform(0.1, 0.5))
        world.history.complaints.append(f"{key} found nobody who took it until the end: {last[:300]}")
        return None

    async def _stop(self, run_id: str, delay: float) -> None:
        world = self._world
        await world.pause(delay)
        # Noted before it is asked: the answer may be lost on its way back.
        world.history.stopped(run_id)
        timeout = aiohttp.ClientTimeout(total=10, sock_connect=2)
        while not world.over.is_set():
            base, began = self._chance.choice(world.endpoints), world.clock.now_ms()
            try:
                async with world.http.post(f"{base}/api/task/{run_id}/cancel", timeout=timeout) as response:
                    if response.status in {200, 202}:
                        world.history.stopped(run_id, world.clock.now_ms())
                    elif response.status == 507:
                        world.no_room(began, "POST /api/task/…/cancel", await response.text())
                    else:
                        await refused(world, "POST /api/task/…/cancel", response)
                    if response.status not in LATER:
                        return
            except BROKEN:
                pass
            await world.pause(0.3)
