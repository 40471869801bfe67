from __future__ import annotations

import asyncio

import pytest

from headwater import service
from headwater.service import Service, running


class Recorder(Service):
    def __init__(self, name: str, diary: list[str]) -> None:
        super().__init__(name)
        self.diary = diary
        self.runs = 0
        self.ran = asyncio.Event()

    async def open(self) -> None:
        self.diary.append(f"{self.name} opens")

    async def run(self) -> None:
        self.runs += 1
        self.ran.set()
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.diary.append(f"{self.name} closes")


async def test_start_and_stop_are_harmless_the_second_time() -> None:
    diary: list[str] = []
    part = Recorder("a", diary)
    await part.stop()
    await part.start()
    await part.start()
    assert part.started.is_set()
    await part.stop()
    await part.stop()
    assert diary == ["a opens", "a closes"]
    assert not part.started.is_set()


async def test_a_stopped_service_can_start_again() -> None:
    part = Recorder("a", [])
    for _ in range(2):
        await part.start()
        await part.ran.wait()
        part.ran.clear()
        await part.stop()
    assert part.runs == 2


async def test_a_failed_open_fails_the_start_and_stops_what_was_started() -> None:
    class Broken(Service):
        async def open(self) -> None:
            raise RuntimeError("no")

    diary: list[str] = []
    with pytest.raises(RuntimeError):
        async with running(Recorder("a", diary), Broken()):
            diary.append("unreachable")
    assert diary == ["a opens", "a closes"]


async def test_services_stop_in_reverse_order_after_all_drained() -> None:
    diary: list[str] = []

    class Drained(Recorder):
        async def drain(self) -> None:
            await super().drain()
            self.diary.append(f"{self.name} drains")

    async with running(Drained("a", diary), Drained("b", diary)):
        pass
    assert diary == ["a opens", "b opens", "b drains", "a drains", "b closes", "a closes"]


async def test_what_it_took_is_given_back_though_its_stop_is_cancelled() -> None:
    diary: list[str] = []
    told = asyncio.Event()

    class Slow(Recorder):
        async def run(self) -> None:
            try:
                await super().run()
            finally:
                told.set()
                await asyncio.Event().wait()

    part = Slow("a", diary)
    await part.start()
    await part.ran.wait()
    stopping = asyncio.create_task(part.stop())
    await told.wait()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert diary == ["a opens", "a closes"]


async def test_one_that_cannot_be_closed_keeps_no_other_from_its_end() -> None:
    diary: list[str] = []

    class Stuck(Recorder):
        async def close(self) -> None:
            raise RuntimeError("it does not close")

    with pytest.raises(RuntimeError, match="does not close"):
        async with running(Recorder("a", diary), Stuck("b", diary), Recorder("c", diary)):
            pass
    assert diary == ["a opens", "b opens", "c opens", "c closes", "a closes"]


async def test_a_run_that_raises_is_logged_and_begins_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "FIRST_BACKOFF", 0.001)
    again = asyncio.Event()

    class Flaky(Service):
        runs = 0

        async def run(self) -> None:
            self.runs += 1
            if self.runs < 3:
                raise RuntimeError("once more")
            again.set()

    part = Flaky()
    await part.start()
    await asyncio.wait_for(again.wait(), 60)
    await part.stop()
    assert part.runs == 3
    assert "Flaky failed and is started again" in caplog.text


async def test_a_service_whose_library_loses_the_cancel_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "CANCEL_AGAIN", 0.01)

    class Deaf(Service):
        lost = 0

        async def run(self) -> None:
            while self.lost < 2:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.lost += 1
            await asyncio.Event().wait()

    part = Deaf()
    await part.start()
    await asyncio.sleep(0)
    await asyncio.wait_for(part.stop(), 60)
    assert part.lost == 2
