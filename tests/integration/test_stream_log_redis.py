"""What the log in Redis promises beyond the contract: its keys, its scripts, and a server in trouble."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest
from redis.asyncio.connection import AbstractConnection

import headwater.streams.redis
from chaos.proxy import Proxy
from headwater.errors import Fenced, LogLost, LogUnavailable
from headwater.runs import Lease, Run, RunState
from headwater.streams import connect
from headwater.streams.base import Appended, Renewed, StreamLog
from headwater.streams.batch import Batch
from headwater.streams.packing import FRAME_BYTES
from headwater.streams.redis import RedisStreamLog
from headwater.streams.sync import SyncMeta
from support.own_redis import CERTIFICATE, frozen, own_redis, tls_in_front_of
from support.streams import RedisWorld, end, new_run, numbered, seqs, texts
from support.wait import eventually

#: Seconds; far above any call's own limit, far below for ever.
BOUND = 60


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[RedisWorld]:
    world = RedisWorld(redis_url)
    yield world
    await world.close()


class TestKeys:
    async def test_the_documented_keys_hold_what_is_documented(self, world: RedisWorld) -> None:
        run = new_run(chat_id="chat-1", input={"text": "hi"})
        await world.log.open(run, 15)
        lease = await world.written(run, 2, "host:1:task")
        name = f"stream:{{{run.id}}}"
        assert sorted(await world.raw.keys("*")) == sorted(
            [f"{name}:chunks", f"{name}:metadata", f"{name}:run", "headwater:due"]
        )
        assert await world.raw.lrange(f"{name}:chunks", 0, -1) == [event.encode().decode() for event in numbered(1, 2)]
        fields = await world.raw.hgetall(f"{name}:metadata")
        # Kept to tell a server that restarted from one that did not.
        assert fields.pop("server")
        times = {name: int(fields.pop(name)) for name in ("created_at", "updated_at", "started_at", "lease_until")}
        assert times["created_at"] <= times["started_at"] <= times["updated_at"] < times["lease_until"]
        assert fields == {
            "status": "running",
            "epoch": lease.epoch,
            "attempt": "1",
            "owner_id": "local",
            "kind": "chat",
            "chat_id": "chat-1",
            "chunk_count": "2",
            "cancel": "0",
            "holder": "host:1:task",
        }
        assert Run.from_json(orjson.loads(await world.raw.get(f"{name}:run"))) == run
        assert await world.raw.zscore("headwater:due", run.id) is not None

    async def test_a_live_run_stays_a_day_at_least_and_an_ended_one_its_ttl(self, world: RedisWorld) -> None:
        run = new_run()
        await world.log.open(run, 15)
        lease = await world.written(run, 2)
        name = f"stream:{{{run.id}}}"
        for key in ("chunks", "metadata", "run"):
            assert 86_000 < await world.raw.ttl(f"{name}:{key}") <= 86_400
            await world.raw.expire(f"{name}:{key}", 100)
        assert await world.raw.ttl("headwater:due") > 86_000
        # It lives on as long as somebody holds it.
        await world.log.renew([lease])
        for key in ("chunks", "metadata", "run"):
            assert 86_000 < await world.raw.ttl(f"{name}:{key}") <= 86_400
        await world.log.append(lease, [end(3)])
        for key in ("chunks", "metadata"):
            assert 3_500 < await world.raw.ttl(f"{name}:{key}") <= 3_600
        assert not await world.raw.exists(f"{name}:run")
        assert int(await world.raw.hget(f"{name}:metadata", "ended_at")) > 0

    async def test_the_channel_carries_the_epoch_the_first_seq_and_the_events(self, world: RedisWorld) -> None:
        run = new_run()
        lease = await world.written(run, 1)
        name = f"stream:{{{run.id}}}"
        async with world.raw.pubsub() as listener:
            await listener.subscribe(name)
            await listener.get_message(timeout=30)
            assert await world.raw.pubsub_channels("stream:*") == [name]
            await world.log.append(lease, numbered(2, 3))
            message = await listener.get_message(timeout=30)
            # Repeated with more: only what is new goes out, under its own seq.
            await world.log.append(lease, numbered(3, 4))
            rest = await listener.get_message(timeout=30)
        lines = [event.encode().decode() for event in numbered(2, 4)]
        assert message["data"] == "\n".join([f"{lease.epoch} 2", *lines[:2]])
        assert rest["data"] == "\n".join([f"{lease.epoch} 4", *lines[2:]])

    async def test_a_revoked_task_is_cancelled_without_a_loop(self, world: RedisWorld) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        with closing(SyncMeta(world.url)) as writer:
            await asyncio.to_thread(writer.cancel, run.id)
            await asyncio.to_thread(writer.cancel, new_run().id)
        assert (await world.log.append(lease, numbered(3, 3))).cancelled

    async def test_a_celery_backend_reads_the_state_without_a_loop(self, world: RedisWorld) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.append(lease, [end(3)])
        with closing(SyncMeta(world.url)) as reader:
            fields = await asyncio.to_thread(reader.read, run.id)
            assert (fields["status"], fields["chunk_count"], fields["attempt"]) == ("done", "3", "1")
            assert await asyncio.to_thread(reader.read, new_run().id) == {}
        with closing(SyncMeta("redis://127.0.0.1:1/0")) as nowhere, pytest.raises(LogUnavailable):
            await asyncio.to_thread(nowhere.read, run.id)


class TestOrdinaryAppends:
    """Those that need not extend the lease: `chunk_count` and the times may lag behind them."""

    @pytest.fixture
    def log(self, world: RedisWorld) -> StreamLog:
        """One that need not extend a lease for minutes."""
        return world.another(lease_seconds=3600)

    async def test_lease_and_fields_are_left_for_the_next_renewal(self, world: RedisWorld, log: StreamLog) -> None:
        run = new_run()
        metadata = f"stream:{{{run.id}}}:metadata"
        lease = await log.claim(run, "worker")
        await world.raw.hset(metadata, "lease_until", 1)
        assert (await log.append(lease, numbered(1, 2))).count == 2
        assert (await log.append(lease, numbered(3, 5))).count == 5
        assert await world.raw.hmget(metadata, "lease_until", "chunk_count") == ["1", "2"]
        await log.renew([lease])
        until, count = await world.raw.hmget(metadata, "lease_until", "chunk_count")
        assert (int(until) > 1, count) == (True, "5")

    async def test_after_a_tenth_of_the_lease_one_extends_it(self, world: RedisWorld) -> None:
        log, run = world.another(lease_seconds=1), new_run()
        metadata = f"stream:{{{run.id}}}:metadata"
        lease = await log.claim(run, "worker")
        await log.append(lease, numbered(1, 1))
        await world.raw.hset(metadata, "lease_until", 1)
        seq = 1

        async def extended() -> bool:
            nonlocal seq
            seq += 1
            assert (await log.append(lease, numbered(seq, seq))).count == seq
            return int(await world.raw.hget(metadata, "lease_until")) > 1

        await eventually(extended)
        assert await world.raw.hget(metadata, "chunk_count") == str(seq)

    async def test_the_first_event_makes_a_list_that_expires_with_its_hash(
        self, world: RedisWorld, log: StreamLog
    ) -> None:
        # The second has not extended this lease before: it is no ordinary one.
        for writer in (log, world.log):
            run = new_run()
            name = f"stream:{{{run.id}}}"
            lease = await log.claim(run, "worker")
            await world.raw.expire(f"{name}:metadata", 5_000)
            await writer.append(lease, numbered(1, 1))
            assert abs(await world.raw.ttl(f"{name}:chunks") - await world.raw.ttl(f"{name}:metadata")) < 100
            assert await world.raw.hget(f"{name}:metadata", "chunk_count") == "1"

    @pytest.mark.parametrize("other", [{"epoch": "another"}, {"attempt": 0}, {"holder": "another"}])
    async def test_epoch_attempt_and_holder_must_all_be_those_of_the_claim(
        self, world: RedisWorld, log: StreamLog, other: dict[str, Any]
    ) -> None:
        run = new_run()
        lease = await log.claim(run, "worker")
        await log.append(lease, numbered(1, 1))
        with pytest.raises(Fenced):
            await log.append(replace(lease, **other), numbered(2, 2))
        assert await world.events(run.id) == numbered(1, 1)

    async def test_the_first_event_stays_where_the_hash_does_not_expire(
        self, world: RedisWorld, log: StreamLog
    ) -> None:
        run = new_run()
        lease = await log.claim(run, "worker")
        await world.raw.persist(f"stream:{{{run.id}}}:metadata")
        await log.append(lease, numbered(1, 1))
        assert await world.events(run.id) == numbered(1, 1)

    async def test_an_heir_goes_on_behind_events_that_the_hash_does_not_count_yet(
        self, world: RedisWorld, log: StreamLog
    ) -> None:
        run = new_run()
        lease = await log.claim(run, "worker")
        await log.append(lease, numbered(1, 2))
        await log.append(lease, numbered(3, 5))
        assert await world.raw.hget(f"stream:{{{run.id}}}:metadata", "chunk_count") == "2"
        await log.release(lease)
        heir = await log.claim(run, "heir")
        assert (heir.length, heir.epoch) == (5, lease.epoch)
        assert await world.events(run.id) == numbered(1, 5)

    async def test_one_that_finds_no_list_leaves_none(self, world: RedisWorld, log: StreamLog) -> None:
        run = new_run()
        chunks = f"stream:{{{run.id}}}:chunks"
        lease = await log.claim(run, "worker")
        await log.append(lease, numbered(1, 3))
        await world.raw.delete(chunks)
        with pytest.raises(LogLost):
            await log.append(lease, numbered(4, 5))
        assert not await world.raw.exists(chunks)

    async def test_what_does_not_belong_there_is_never_published(self, world: RedisWorld, log: StreamLog) -> None:
        run = new_run()
        lease = await log.claim(run, "worker")
        await log.append(lease, numbered(1, 3))
        async with world.raw.pubsub() as listener:
            await listener.subscribe(f"stream:{{{run.id}}}")
            await listener.get_message(timeout=30)
            await log.append(lease, numbered(2, 3))
            with pytest.raises(LogLost):
                await log.append(lease, numbered(5, 5))
            await log.append(lease, numbered(4, 4))
            message = await listener.get_message(timeout=30)
        assert message["data"] == f"{lease.epoch} 4\n{numbered(4, 4)[0].encode().decode()}"
        assert await world.events(run.id) == numbered(1, 4)


class TestLosses:
    async def test_events_that_vanished_begin_a_new_epoch_at_the_next_claim(self, world: RedisWorld) -> None:
        run = new_run()
        first = await world.written(run, 3)
        await world.raw.delete(f"stream:{{{run.id}}}:chunks")
        second = await world.log.claim(run, "worker")
        assert (second.attempt, second.length) == (2, 0)
        assert second.epoch != first.epoch

    async def test_a_closed_log_without_its_events_counts_as_none(self, world: RedisWorld) -> None:
        run = new_run()
        await world.log.append(await world.log.claim(run, "worker"), [*numbered(1, 2), end(3)])
        await world.raw.delete(f"stream:{{{run.id}}}:chunks")
        assert await world.log.read(run.id, 0, 10) is None

    async def test_events_without_their_hash_are_not_mistaken_for_a_log(self, world: RedisWorld) -> None:
        run, other = new_run(), new_run()
        for lost in (run, other):
            await world.written(lost, 3)
            await world.raw.delete(f"stream:{{{lost.id}}}:metadata")
            assert await world.log.read(lost.id, 0, 10) is None
        assert (await world.log.claim(run, "worker")).length == 0
        await world.log.open(other, 15)
        page = await world.log.read(other.id, 0, 10)
        assert page is not None
        assert (page.count, page.events) == (0, [])

    async def test_a_run_that_is_announced_again_is_due_in_time_whatever_its_expired_log_left(
        self, world: RedisWorld
    ) -> None:
        run = new_run()
        # When a log of an ended run was to be compressed.
        await world.raw.zadd("headwater:due", {run.id: 9_999_999_999_999})
        await world.log.open(run, 0)
        assert [due.run_id for due in await world.log.due(10)] == [run.id]

    async def test_a_run_of_which_only_the_name_is_left_is_due_without_a_run(self, world: RedisWorld) -> None:
        run = new_run()
        await world.log.open(run, 0)
        await world.raw.delete(f"stream:{{{run.id}}}:metadata", f"stream:{{{run.id}}}:run")
        (due,) = await world.log.due(10)
        assert (due.run_id, due.run, due.meta) == (run.id, None, None)
        await world.log.forget(run.id)
        assert await world.log.due(10) == []

    async def test_after_a_restart_that_kept_the_log_its_holder_goes_on_and_an_heir_begins_a_new_epoch(
        self, tmp_path: Path
    ) -> None:
        # An heir cannot know whether the restart took the newest events along.
        with own_redis(tmp_path, appendonly="yes", appendfsync="always") as server:
            world = RedisWorld(server.url())
            run = new_run()
            lease = await world.written(run, 3)
            server.restart()
            assert (await world.log.append(lease, numbered(4, 4))).count == 4
            await world.log.release(lease)
            heir = await world.log.claim(run, "heir")
            assert (heir.attempt, heir.length) == (2, 0)
            assert heir.epoch != lease.epoch
            await world.close()

    async def test_after_a_restart_that_lost_the_log_its_holder_writes_it_again(self, tmp_path: Path) -> None:
        with own_redis(tmp_path) as server:
            world = RedisWorld(server.url())
            run = new_run()
            lease = await world.written(run, 3)
            server.restart()
            with pytest.raises(LogLost):
                await world.log.append(lease, numbered(4, 4))
            assert (await world.log.restore(lease, run, numbered(1, 4))).count == 4
            assert seqs(await world.events(run.id)) == [1, 2, 3, 4]
            await world.close()


class TestForeign:
    """Something else has written under the name of a run's key: that is thrown away, and nobody else's trouble."""

    async def spoil(self, world: RedisWorld, run: Run, key: str) -> None:
        name = f"stream:{{{run.id}}}:{key}"
        await world.raw.delete(name)
        await world.raw.sadd(name, "foreign")

    @pytest.mark.parametrize("key", ["metadata", "chunks", "run"])
    async def test_whoever_is_due_is_found(self, world: RedisWorld, key: str, caplog: pytest.LogCaptureFixture) -> None:
        spoiled, other = new_run(), new_run()
        for run in (spoiled, other):
            await world.log.open(run, 0)
        await self.spoil(world, spoiled, key)
        found = {due.run_id: due.run for due in await world.log.due(10)}
        # Without a run it is forgotten, and its row brings it back.
        assert found == {spoiled.id: None if key == "run" else spoiled, other.id: other}
        assert f"stream:{{{spoiled.id}}}:{key}" in caplog.text
        assert await world.log.due(10)

    @pytest.mark.parametrize(("key", "value"), [("run", "{}"), ("run", "what?"), ("metadata", "what?")])
    async def test_what_cannot_be_read_hides_nobody_who_is_due(self, world: RedisWorld, key: str, value: str) -> None:
        spoiled, other = new_run(), new_run()
        for run in (spoiled, other):
            await world.log.open(run, 0)
        if key == "run":
            await world.raw.set(f"stream:{{{spoiled.id}}}:run", value)
        else:
            await world.raw.hset(f"stream:{{{spoiled.id}}}:metadata", "status", value)
        assert {due.run_id: due.run for due in await world.log.due(10)} == {spoiled.id: None, other.id: other}

    @pytest.mark.parametrize("field", ["status", "attempt", "lease_until"])
    async def test_metadata_that_cannot_be_read_count_as_lost_and_are_nobody_elses_trouble(
        self, world: RedisWorld, field: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        spoiled, other = new_run(), new_run()
        for run in (spoiled, other):
            await world.log.open(run, 0)
        await world.raw.hset(f"stream:{{{spoiled.id}}}:metadata", field, "what?")
        lost, whole = await world.log.metas([spoiled.id, other.id])
        assert lost is None
        assert whole is not None
        assert whole.run_id == other.id
        assert await world.log.cancel(spoiled.id) is None
        assert f"metadata of run {spoiled.id} cannot be read" in caplog.text

    async def test_an_attempt_that_cannot_be_read_is_written_again_and_others_keep_their_leases(
        self, world: RedisWorld
    ) -> None:
        spoiled, other = new_run(), new_run()
        leases = [await world.log.claim(run, "worker") for run in (spoiled, other)]
        await world.log.append(leases[0], numbered(1, 2))
        await world.raw.hset(f"stream:{{{spoiled.id}}}:metadata", "attempt", "what?")
        assert await world.log.renew(leases) == [Renewed.LOST, Renewed.HELD]
        with pytest.raises(LogLost):
            await world.log.append(leases[0], numbered(3, 3))
        await world.log.restore(leases[0], spoiled, numbered(1, 3))
        assert await world.log.renew(leases) == [Renewed.HELD, Renewed.HELD]
        assert await world.events(spoiled.id) == numbered(1, 3)

    @pytest.mark.parametrize("field", ["attempt", "chunk_count", "lease_until"])
    async def test_a_run_of_which_a_field_cannot_be_read_can_be_claimed(self, world: RedisWorld, field: str) -> None:
        run = new_run()
        await world.log.release(await world.written(run, 2))
        await world.raw.hset(f"stream:{{{run.id}}}:metadata", field, "what?")
        lease = await world.log.claim(run, "another")
        assert (await world.log.append(lease, numbered(lease.length + 1, lease.length + 1))).count == lease.length + 1

    @pytest.mark.parametrize("key", ["metadata", "chunks"])
    async def test_its_holder_writes_it_again_and_others_notice_nothing(self, world: RedisWorld, key: str) -> None:
        run, other = new_run(), new_run()
        lease, unharmed = await world.written(run, 3), await world.written(other, 3)
        await self.spoil(world, run, key)
        assert (await world.log.renew([lease, unharmed]))[1] is Renewed.HELD
        assert (await world.log.metas([run.id, other.id]))[1] is not None
        await self.spoil(world, run, key)
        answers = await asyncio.gather(
            *(world.log.append(one, numbered(4, 4)) for one in (lease, unharmed)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [LogLost, Appended]
        await self.spoil(world, run, key)
        assert (await world.log.restore(lease, run, numbered(1, 4))).count == 4
        page = await world.log.read(run.id, 0, 10)
        assert page is not None
        assert (page.epoch, page.events) == (lease.epoch, numbered(1, 4))

    @pytest.mark.parametrize("key", ["metadata", "chunks", "run"])
    async def test_it_can_be_claimed_under_a_new_epoch(self, world: RedisWorld, key: str) -> None:
        run = new_run()
        first = await world.written(run, 3)
        await world.log.release(first)
        await self.spoil(world, run, key)
        heir = await world.log.claim(run, "heir")
        assert (heir.length, heir.epoch == first.epoch) == ((3, True) if key == "run" else (0, False))
        assert (await world.log.append(heir, numbered(heir.length + 1, 4))).count == 4

    async def test_one_that_nobody_has_is_announced_and_cancelled(self, world: RedisWorld) -> None:
        run = new_run()
        await self.spoil(world, run, "metadata")
        await world.log.open(run, 10)
        await self.spoil(world, run, "chunks")
        meta = await world.log.cancel(run.id)
        assert meta is not None
        assert meta.cancelled

    async def test_what_is_nobodys_run_stays(self, world: RedisWorld) -> None:
        await world.raw.set("headwater:due", "foreign")
        with pytest.raises(LogUnavailable, match="WRONGTYPE"):
            await world.log.due(10)
        assert await world.raw.get("headwater:due") == "foreign"


class TestTrouble:
    async def test_scripts_are_loaded_again_when_the_server_forgot_them(self, world: RedisWorld) -> None:
        run, other = new_run(), new_run()
        lease = await world.written(run, 1)
        await world.raw.script_flush()
        # One alone, and several in one trip.
        assert (await world.log.append(lease, numbered(2, 2))).count == 2
        await world.raw.script_flush()
        second = await world.log.claim(other, "worker")
        await world.raw.script_flush()
        assert [str(answer) for answer in await world.log.renew([lease, second])] == ["held", "held"]

    async def test_a_full_server_is_unavailable_and_takes_all_or_nothing(self, tmp_path: Path) -> None:
        with own_redis(tmp_path) as server:
            world = RedisWorld(server.url())
            run = new_run()
            lease = await world.written(run, 2)
            await world.raw.config_set("maxmemory", 1)
            with pytest.raises(LogUnavailable, match="memory"):
                await world.log.append(lease, numbered(3, 4))
            news = [new_run() for _ in range(3)]
            with pytest.raises(LogUnavailable):
                await world.log.open(news[0], 15)
            with pytest.raises(LogUnavailable):
                await world.log.claim(news[1], "worker")
            with pytest.raises(LogUnavailable):
                await world.log.restore(Lease(news[2].id, 1, "worker", "e1", 0), news[2], numbered(1, 2))
            # A log that is there, but not due for anybody, would wait for ever.
            assert await world.log.metas([new.id for new in news]) == [None, None, None]
            assert seqs(await world.events(run.id)) == [1, 2]
            await world.raw.config_set("maxmemory", 0)
            assert (await world.log.append(lease, numbered(3, 4))).count == 4
            await world.close()

    async def test_a_frozen_server_is_unavailable_in_bounded_time_and_usable_afterwards(self, tmp_path: Path) -> None:
        with own_redis(tmp_path) as server:
            world = RedisWorld(server.url())
            run = new_run()
            lease = await world.written(run, 2)
            with frozen(server):
                async with asyncio.timeout(BOUND):
                    calls = (
                        world.log.append(lease, numbered(3, 3)),
                        world.log.read(run.id, 0, 10),
                        world.log.renew([lease]),
                        world.log.ping(),
                    )
                    answers = await asyncio.gather(*calls, return_exceptions=True)
                assert [type(answer) for answer in answers] == [LogUnavailable] * 4
            # The append may have arrived while nobody waited for its answer any more: said again, it counts once.
            assert (await world.log.append(lease, numbered(3, 4))).count == 4
            assert seqs(await world.events(run.id)) == [1, 2, 3, 4]
            await world.close()

    async def test_more_calls_than_connections_all_get_their_answer(self, world: RedisWorld) -> None:
        run = new_run()
        await world.written(run, 3)
        pages = await asyncio.gather(*(world.log.read(run.id, 0, 10) for _ in range(200)))
        assert all(page is not None and page.count == 3 for page in pages)

    async def test_a_connection_that_closed_under_its_client_is_unavailable_and_replaced(
        self, world: RedisWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await world.log.ping()

        async def closed(connection: AbstractConnection, command: object) -> None:
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

        with monkeypatch.context() as patch:
            # As uvloop does between the loss of a connection and the moment it tells of it.
            patch.setattr(AbstractConnection, "_send_packed_command", closed)
            with pytest.raises(LogUnavailable, match="closed"):
                await world.log.ping()
        await world.log.ping()

    async def test_a_stopped_server_is_unavailable_until_it_is_back(self, tmp_path: Path) -> None:
        with own_redis(tmp_path) as server:
            world = RedisWorld(server.url())
            await world.log.ping()
            server.stop()
            async with asyncio.timeout(BOUND):
                with pytest.raises(LogUnavailable):
                    await world.log.ping()
            server.start()
            await world.log.ping()
            await world.close()

    async def test_a_wrong_password_is_named(self, tmp_path: Path) -> None:
        with own_redis(tmp_path) as server:
            world = RedisWorld(server.url())
            await world.raw.config_set("requirepass", "right")
            log = connect(server.url().replace("redis://", "redis://:wrong@"))
            with pytest.raises(LogUnavailable, match=r"(?i)password|auth"):
                await log.ping()
            await log.close()
            await world.close()


class TestTrips:
    """Appends of many runs share a connection and its round trips."""

    async def held(self, world: RedisWorld, count: int) -> list[Lease]:
        leases = [await world.log.claim(new_run(), "worker") for _ in range(count)]
        # Makes the connection and loads the script.
        await world.log.append(leases[0], numbered(1, 1))
        return leases

    async def test_appends_said_at_once_take_few_trips_and_each_gets_its_own_answer(self, world: RedisWorld) -> None:
        leases = await self.held(world, 21)
        before = (await world.raw.info("stats"))["total_reads_processed"]
        answers = await asyncio.gather(
            *(world.log.append(lease, numbered(1, 1 + n % 3)) for n, lease in enumerate(leases[1:]))
        )
        # The question itself is one of them.
        assert (await world.raw.info("stats"))["total_reads_processed"] - before < 10
        assert [answer.count for answer in answers] == [1 + n % 3 for n in range(20)]
        assert len([one for one in await world.raw.client_list() if one["name"] == "headwater-appends"]) == 1

    async def test_one_that_is_refused_and_one_that_gives_up_disturb_nobody(self, world: RedisWorld) -> None:
        leases = await self.held(world, 6)
        await world.log.release(leases[1])
        heir = await world.log.claim(new_run(id=leases[1].run_id), "heir")
        calls = [asyncio.create_task(world.log.append(lease, numbered(1, 2))) for lease in leases[1:]]
        await asyncio.sleep(0)
        calls[2].cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer).__name__ for answer in answers] == [
            "Fenced",
            "Appended",
            "CancelledError",
            "Appended",
            "Appended",
        ]
        assert (await world.log.append(heir, numbered(1, 1))).count == 1

    async def test_scripts_that_the_server_forgot_are_loaded_for_all(self, world: RedisWorld) -> None:
        leases = await self.held(world, 9)
        await world.raw.script_flush()
        answers = await asyncio.gather(*(world.log.append(lease, numbered(1, 2)) for lease in leases[1:]))
        assert {answer.count for answer in answers} == {2}

    async def test_a_connection_that_was_cut_costs_nothing_but_a_new_one(self, world: RedisWorld) -> None:
        leases = await self.held(world, 3)
        (ours,) = [one for one in await world.raw.client_list() if one["name"] == "headwater-appends"]
        await world.raw.client_kill_filter(_id=ours["id"])
        answers = await asyncio.gather(*(world.log.append(lease, numbered(1, 2)) for lease in leases[1:]))
        assert [answer.count for answer in answers] == [2, 2]

    async def test_appends_whose_answers_are_lost_on_the_way_count_once(self, world: RedisWorld) -> None:
        leases = await self.held(world, 3)
        server = urlsplit(world.url)
        assert server.port is not None
        async with Proxy(("127.0.0.1", server.port)).run() as proxy:
            log = RedisStreamLog(f"redis://127.0.0.1:{proxy.port}/0", ttl=60, lease_seconds=10)
            # One byte more than the answer to the sign-in, `+OK`: what is asked is carried out and not answered.
            proxy.cut_after = 6
            calls = asyncio.gather(*(log.append(lease, numbered(1, 2)) for lease in leases[1:]))
            await eventually(lambda: _has(world, leases[1:], 2))
            proxy.cut_after = None
            assert [answer.count for answer in await calls] == [2, 2]
            await log.close()
        for lease in leases[1:]:
            assert seqs(await world.events(lease.run_id)) == [1, 2]

    async def test_a_large_append_makes_nobody_wait_and_arrives(self, world: RedisWorld) -> None:
        leases = await self.held(world, 3)
        large = texts(1, "x" * 4_000_000)
        answers = await asyncio.gather(
            world.log.append(leases[1], large), *(world.log.append(leases[2], numbered(n, n)) for n in range(1, 5))
        )
        assert [answer.count for answer in answers] == [1, 1, 2, 3, 4]
        assert await world.raw.llen(f"stream:{{{leases[1].run_id}}}:chunks") == 1

    async def test_more_than_one_trip_holds_goes_in_several(self, world: RedisWorld) -> None:
        (first, *leases) = await self.held(world, 12)
        much = texts(1, "x" * 60_000)
        answers = await asyncio.gather(*(world.log.append(lease, much) for lease in leases))
        assert {answer.count for answer in answers} == {1}
        assert (await world.log.append(first, numbered(2, 2))).count == 2

    async def test_a_server_that_became_a_replica_is_left_for_a_new_connection(self, tmp_path: Path) -> None:
        with own_redis(tmp_path) as server:
            world = RedisWorld(server.url())
            lease = await world.written(new_run(), 1)
            await world.raw.replicaof("127.0.0.1", 1)
            with pytest.raises(LogUnavailable, match="READONLY"):
                await world.log.append(lease, numbered(2, 2))
            await eventually(lambda: _gone(world, "headwater-appends"))
            await world.raw.replicaof("no", "one")
            assert (await world.log.append(lease, numbered(2, 2))).count == 2
            await world.close()

    async def test_who_still_waits_when_the_log_is_closed_is_told(self, tmp_path: Path) -> None:
        with own_redis(tmp_path) as server:
            world = RedisWorld(server.url())
            lease = await world.written(new_run(), 1)
            with frozen(server):
                call = asyncio.create_task(world.log.append(lease, numbered(2, 2)))
                await asyncio.sleep(0)
                await world.log.close()
                with pytest.raises(LogUnavailable, match="given back"):
                    await call
            await world.close()


class TestPacking:
    """The log of a run that ended some time ago becomes zstd frames; nobody who reads it can tell."""

    def packer(self, world: RedisWorld, *, over: int = 1000, after: float = 0) -> StreamLog:
        return RedisStreamLog(world.url, ttl=3600, lease_seconds=10, compress_over=over, compress_after=after)

    async def ended(self, world: RedisWorld, *texts_: str) -> Lease:
        lease = await world.log.claim(new_run(), "worker")
        await world.log.append(lease, texts(1, *texts_))
        await world.log.append(lease, [end(len(texts_) + 1)])
        await world.look_soon(lease.run_id)
        return lease

    async def packed(self, world: RedisWorld, lease: Lease) -> str | None:
        packed: str | None = await world.raw.hget(f"stream:{{{lease.run_id}}}:metadata", "packed")
        return packed

    async def test_it_says_the_same_from_everywhere_takes_less_and_lives_as_long(self, world: RedisWorld) -> None:
        lease = await self.ended(world, *(f" word {n}" for n in range(500)))
        chunks, before = f"stream:{{{lease.run_id}}}:chunks", await world.events(lease.run_id)
        await world.raw.expire(chunks, 1234)
        size = await world.raw.memory_usage(chunks)
        log = self.packer(world)
        assert await log.due(10) == []
        assert await self.packed(world, lease) == "1"
        assert await world.raw.llen(chunks) == 1
        assert 1200 < await world.raw.ttl(chunks) <= 1234
        assert await world.raw.memory_usage(chunks) < size / 5
        assert await world.raw.zscore("headwater:due", lease.run_id) is None
        assert await world.events(lease.run_id) == before
        for after, limit in ((0, 1), (1, 7), (250, 1000), (499, 10), (500, 1), (501, 5), (9999, 5)):
            page = await world.log.read(lease.run_id, after, limit)
            assert page is not None
            assert (page.epoch, page.count, page.closed) == (lease.epoch, 501, True)
            assert list(page.events) == before[after : after + limit]
        meta = await world.log.meta(lease.run_id)
        assert meta is not None
        assert (meta.count, meta.status) == (501, RunState.DONE)
        await log.close()

    async def test_a_reader_on_its_way_through_sees_no_hole(self, world: RedisWorld) -> None:
        # Events of very different sizes, so that frames end anywhere.
        lease = await self.ended(world, *("x" * (n * 7919 % 40_000) for n in range(60)), "y" * (2 * FRAME_BYTES), "z")
        before = await world.events(lease.run_id)
        page = await world.log.read(lease.run_id, 0, 5)
        assert page is not None
        seen = list(page.events)
        log = self.packer(world)
        await log.due(10)
        assert len((await self.packed(world, lease) or "").split(",")) > 5
        while (page := await world.log.read(lease.run_id, len(seen), 5)) is not None and page.events:
            seen += page.events
        assert seen == before
        await log.close()

    async def test_what_is_small_or_runs_or_ended_just_now_stays_readable(self, world: RedisWorld) -> None:
        small, running = await self.ended(world, "a"), await world.written(new_run(), 100)
        await world.look_soon(running.run_id)
        log = self.packer(world)
        assert await log.due(10) == []
        fresh = await self.ended(world, "b" * 2000)
        later = self.packer(world, after=60)
        assert await later.due(10) == []
        for lease in (small, running, fresh):
            assert await self.packed(world, lease) is None
            first = await world.raw.lindex(f"stream:{{{lease.run_id}}}:chunks", 0)
            assert orjson.loads(first)["seq"] == 1
        assert await world.raw.zscore("headwater:due", small.run_id) is None
        seconds, _ = await world.raw.time()
        assert 50_000 < await world.raw.zscore("headwater:due", fresh.run_id) - seconds * 1000 <= 61_000
        await log.close()
        await later.close()

    async def test_of_many_some_are_packed_at_each_look(
        self, world: RedisWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(headwater.streams.redis, "PACKS", 2)
        leases = [await self.ended(world, "x" * 2000) for _ in range(5)]
        log = self.packer(world)
        packed: list[int] = []
        for _ in range(3):
            assert await log.due(10) == []
            packed.append(len([lease for lease in leases if await self.packed(world, lease)]))
            for name, score in await world.raw.zrange("headwater:due", 0, -1, withscores=True):
                assert score > (await world.raw.time())[0] * 1000
                await world.look_soon(name)
        assert packed == [2, 4, 5]
        assert await world.raw.zcard("headwater:due") == 0
        await log.close()

    async def test_two_at_once_pack_it_once(self, world: RedisWorld) -> None:
        lease = await self.ended(world, *(f" word {n}" for n in range(500)))
        before = await world.events(lease.run_id)
        logs = [self.packer(world) for _ in range(4)]
        assert await asyncio.gather(*(log.due(10) for log in logs)) == [[], [], [], []]
        assert await self.packed(world, lease) == "1"
        assert await world.events(lease.run_id) == before
        for log in logs:
            await log.close()

    async def test_a_full_server_keeps_it_as_it_is_and_says_who_is_due(self, tmp_path: Path) -> None:
        with own_redis(tmp_path) as server:
            world = RedisWorld(server.url())
            ended = [await self.ended(world, "a" * 5000) for _ in range(2)]
            waiting = new_run()
            await world.log.open(waiting, 0)
            before = [await world.events(lease.run_id) for lease in ended]
            now, later = self.packer(world), self.packer(world, after=60)
            await world.raw.config_set("maxmemory", 1)
            for log in (now, later):
                assert [due.run_id for due in await log.due(10)] == [waiting.id]
                await log.close()
            assert [await world.events(lease.run_id) for lease in ended] == before
            assert await self.packed(world, ended[0]) is None
            await world.close()

    async def test_frames_that_vanished_count_as_no_log(self, world: RedisWorld) -> None:
        lease = await self.ended(world, *("x" * 50_000 for _ in range(6)))
        log = self.packer(world)
        await log.due(10)
        await world.raw.ltrim(f"stream:{{{lease.run_id}}}:chunks", 0, -2)
        assert await world.log.read(lease.run_id, 0, 10) is None
        await log.close()


async def _gone(world: RedisWorld, name: str) -> bool:
    return name not in {one["name"] for one in await world.raw.client_list()}


async def _has(world: RedisWorld, leases: Sequence[Lease], count: int) -> bool:
    return [await world.raw.llen(f"stream:{{{lease.run_id}}}:chunks") for lease in leases] == [count] * len(leases)


async def test_a_unix_socket_and_tls_work_for_the_log_and_its_feed(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []

    class Ear:
        def subscribed(self) -> None:
            heard.append(("subscribed", 0))

        def published(self, batch: Batch) -> None:
            heard.append(("published", len(batch.events)))

    def lost() -> None:
        heard.append(("lost", 0))

    # A unix socket's path is limited to about 100 characters.
    socket = f"/tmp/headwater-test-{os.getpid()}.sock"
    with own_redis(tmp_path, password="s3cret/:@", unixsocket=socket) as server:
        async with tls_in_front_of(server.port) as port:
            password = "s3cret%2F%3A%40"
            for url in (
                f"unix://:{password}@{socket}",
                f"redis://:{password}@127.0.0.1:{server.port}/3",
                f"redis://default:{password}@127.0.0.1:{server.port}",
                f"rediss://:{password}@127.0.0.1:{port}/0?ssl_ca_certs={CERTIFICATE}",
                f"rediss://:{password}@127.0.0.1:{port}/0?ssl_cert_reqs=none",
            ):
                heard.clear()
                log = RedisStreamLog(url, ttl=60, lease_seconds=10)
                feed = log.feed()
                await feed.start(lost)
                run = new_run()
                feed.follow(run.id, Ear())
                await eventually(partial(heard.__contains__, ("subscribed", 0)))
                lease = await log.claim(run, "worker")
                await log.append(lease, [*numbered(1, 2), end(3)])
                await eventually(partial(heard.__contains__, ("published", 3)))
                await feed.stop()
                await log.close()
