"""The end of `doherty up`: asked for, hurried, or as sudden as a power cut's.

Asked for, it loses no answer and leaves no process. When the parent alone is killed, nobody else
notices: manager, proxy and replicas go on, each in a session of its own. The next `doherty up` on
that run folder does not fight them: it says whom to end. When everything but the replicas is gone,
it adopts them.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.fakes.load import Load, Outcome
from tests.fakes.programs import kill_for_certain, until
from tests.fakes.whole import REPLICAS, WORKERS, Whole, no_orphans, until_gone, whole

pytestmark = pytest.mark.faults

CLIENTS = 12


async def test_sigterm_under_load(tmp_path: Path) -> None:
    with whole(tmp_path) as up:
        marks = up.marks()
        async with Load(up.url, clients=CLIENTS) as load:
            await load.until_more(2 * CLIENTS)
            await load.until_streaming(CLIENTS // 2)
            streaming = load.streaming()
            up.up.process.send_signal(signal.SIGTERM)
            await load.until(
                lambda: bool(load.having(Outcome.REFUSED)), "the port is closed to new ones"
            )
            await load.stop()
        assert await asyncio.to_thread(up.up.ended) == 0, up.up.said
        assert not [process for process in marks if process.alive]
    assert {r.outcome for r in streaming} == {Outcome.COMPLETE}, load.summary()
    # Whoever got the head of an answer got all of it.
    assert not load.having(Outcome.CUT_VISIBLY, Outcome.CUT_SILENTLY), load.summary()
    assert all(r.tokens == 30 for r in load.having(Outcome.COMPLETE))
    assert {r.code for r in load.having(Outcome.ERROR)} <= {"draining"}
    assert "stopped" in up.up.said


async def test_a_second_sigterm_hurries(tmp_path: Path) -> None:
    with whole(tmp_path) as up:
        marks = up.marks()
        # Half a minute of words, which the grace would allow for.
        async with Load(up.url, clients=CLIENTS, max_tokens=3000) as load:
            await load.until_streaming(CLIENTS)
            streaming = load.streaming()
            await load.until(lambda: all(r.tokens for r in streaming), "words of every answer")
            up.up.process.send_signal(signal.SIGTERM)
            await load.until(lambda: "stopping" in up.up.said, "it has heard the first")
            up.up.process.send_signal(signal.SIGTERM)
            await load.stop()
        assert await asyncio.to_thread(up.up.ended) == 0, up.up.said
        assert not [process for process in marks if process.alive]
    assert {r.outcome for r in streaming} == {Outcome.CUT_VISIBLY}, load.summary()
    assert all(r.tokens < 3000 for r in streaming)


async def test_killing_the_parent_alone(tmp_path: Path) -> None:
    with no_orphans() as marks:
        first = Whole(tmp_path)
        first.start()
        marks.extend(first.marks())
        before = first.replica_pids()
        manager_pid, proxy_pid = first.manager_pid(), first.proxy_pid()
        offline_pid = first.offline_pid()
        async with Load(first.url, clients=CLIENTS) as load:
            await load.until_more(CLIENTS)
            await asyncio.to_thread(kill_for_certain, first.up.pid)
            first.up.ended()
            await load.until_more(3 * CLIENTS)
            await load.stop()
        assert not load.failed(), load.summary()
        assert first.replica_pids() == before
        assert first.ready_in(first.admin_url + "/replicas") == REPLICAS

        # The next one starts nothing, and says what is in its way, one thing after the other.
        port = first.url.rpartition(":")[2]
        second = Whole(tmp_path, log_name="second.log").up
        assert second.ended() == 1
        assert f"(pid {manager_pid}) already runs on {first.run_dir}" in second.said
        assert f"kill {manager_pid}" in second.said
        os.kill(manager_pid, signal.SIGTERM)
        until(lambda: not any(m.alive for m in marks if m.pid == manager_pid), "manager's end")
        third = Whole(tmp_path, log_name="third.log").up  # on whatever port
        assert third.ended() == 1
        assert f"left its proxy running (pid {proxy_pid})" in third.said
        assert f"kill {proxy_pid}" in third.said
        os.kill(proxy_pid, signal.SIGTERM)
        until(lambda: not any(m.alive for m in marks if m.pid == proxy_pid), "proxy's end")
        fourth = Whole(tmp_path, log_name="fourth.log").up
        assert fourth.ended() == 1
        assert f"left its offline service running (pid {offline_pid})" in fourth.said
        os.kill(offline_pid, signal.SIGTERM)
        until_gone(marks)

        fifth = Whole(tmp_path, f"--port={port}", log_name="fifth.log")
        fifth.start()
        marks.extend(fifth.marks())
        assert fifth.url == first.url
        assert not set(fifth.replica_pids().values()) & set(before.values())
        assert fifth.up.end() == 0


def test_killing_all_but_the_replicas(tmp_path: Path) -> None:
    with no_orphans() as marks:
        first = Whole(tmp_path)
        first.start()
        marks.extend(first.marks())
        before = first.replica_pids()
        workers = first.worker_pids()
        assert len(workers) == WORKERS
        services = (first.manager_pid(), first.offline_pid(), first.proxy_pid())
        for pid in (first.up.pid, *services, *workers):
            kill_for_certain(pid)
        first.up.ended()

        second = Whole(tmp_path, log_name="second.log")
        second.start()
        marks.extend(second.marks())
        assert second.replica_pids() == before
        assert set(second.restarts().values()) == {0}
        assert second.up.end() == 0


async def test_killing_the_proxy(tmp_path: Path) -> None:
    """Its workers finish what they have; `up` starts it again on the same port."""
    with whole(tmp_path) as up:
        pid, workers = up.proxy_pid(), up.worker_pids()
        before = up.replica_pids()
        async with Load(up.url, clients=CLIENTS) as load:
            await load.until_more(CLIENTS)
            await load.until_streaming(CLIENTS // 2)
            streaming = load.streaming()
            await asyncio.to_thread(kill_for_certain, pid)
            await load.until(
                lambda: all(r.outcome is not None for r in streaming), "the streams' end"
            )
            await asyncio.to_thread(until, lambda: "starting it again" in up.up.said, "up notices")
            await asyncio.to_thread(up.until_whole)
            await load.until_more(2 * CLIENTS)
            await load.stop()
        assert {r.outcome for r in streaming} == {Outcome.COMPLETE}, load.summary()
        assert not load.having(Outcome.CUT_VISIBLY, Outcome.CUT_SILENTLY), load.summary()
        assert not set(up.worker_pids()) & set(workers)
        assert up.replica_pids() == before
        await asyncio.to_thread(up.until_at_rest)
