"""Counts of several workers, over deaths, a reload and an upgrade: none is lost, none is double."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.engine import Connection, ScriptedEngine
from tests.fakes.plane import CHAT_BODY, chat_request
from tests.fakes.proxy_process import ProxyProcess, alive
from tests.fakes.talk import ask

USAGE = b'{"usage":{"prompt_tokens":7,"completion_tokens":3}}'
HISTOGRAMS = ("request_duration_seconds", "time_to_first_token_seconds")


async def _answer(connection: Connection, _: object) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 51\r\n\r\n" + USAGE)


async def _send(proxy: ProxyProcess, count: int) -> None:
    requests = (ask(proxy.port, chat_request(CHAT_BODY)) for _ in range(count))
    assert {answer.status for answer in await asyncio.gather(*requests)} == {200}


async def _families(proxy: ProxyProcess) -> dict[str, Metric]:
    text = (await proxy.admin("/metrics")).body.decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def _sum(family: Metric, suffix: str, **labels: str) -> float:
    return sum(
        sample.value
        for sample in family.samples
        if sample.name == family.name + suffix and labels.items() <= sample.labels.items()
    )


async def _assert_counted(proxy: ProxyProcess, count: int) -> None:
    """All say that there were so many requests: every count, every histogram, every sum."""
    families = await _families(proxy)
    requests = families["doherty_requests"]
    assert _sum(requests, "_total", route="chat", code="200", outcome="ok") == count
    for name in HISTOGRAMS:
        family = families[f"doherty_{name}"]
        assert _sum(family, "_count", route="chat") == count
        assert _sum(family, "_bucket", route="chat", le="+Inf") == count
    assert _sum(families["doherty_class_requests"], "_total") == count
    assert _sum(families["doherty_class_time_to_first_token_seconds"], "_count") == count
    assert _sum(families["doherty_overhead_seconds"], "_count") == count
    assert _sum(families["doherty_routing_decisions"], "_total") == count
    assert _sum(families["doherty_replica_requests"], "_total") == count
    assert _sum(families["doherty_prompt_tokens"], "_total") == 7 * count


@pytest.mark.faults
async def test_counts_are_exact_over_deaths_a_reload_and_an_upgrade(tmp_path: Path) -> None:
    config = tmp_path / "proxy.yaml"
    config.write_text("proxy: {expose_routing: false}\n")
    async with (
        ScriptedEngine(_answer) as engine,
        ProxyProcess(
            *("--workers", "3", "--worker-urls", engine.url, "--config", str(config)),
        ) as proxy,
    ):
        await _send(proxy, 60)
        await _assert_counted(proxy, 60)  # who has been asked has told: that is kept
        for victim in proxy.workers()[:2]:
            os.kill(victim, signal.SIGKILL)
        await _until(proxy, "doherty_worker_restarts_total", 2)
        await _until(proxy, "doherty_workers", 3)
        await _send(proxy, 40)
        await _assert_counted(proxy, 100)
        config.write_text("proxy: {expose_routing: true}\n")
        await proxy.until_said(r"reloaded; changed: expose_routing")
        await _send(proxy, 30)
        await _assert_counted(proxy, 130)
        assert len(engine.requests) == 130
        left = await proxy.upgrade()
        assert await proxy.metric("doherty_requests_total") >= 130, "it does not begin at zero"
        await _send(proxy, 20)
        async with asyncio.timeout(30):  # some may have come to the one that leaves
            while alive(left):
                await asyncio.sleep(0.05)
        await _assert_counted(proxy, 150)  # what the one before counts, it tells the new one
        assert len(engine.requests) == 150


async def _until(proxy: ProxyProcess, name: str, value: float) -> None:
    async with asyncio.timeout(30):  # only keeps a broken test from hanging
        while await proxy.metric(name) != value:
            await asyncio.sleep(0.05)


async def test_what_a_worker_uses_is_told_by_worker(tmp_path: Path) -> None:
    async with (
        ScriptedEngine(_answer) as engine,
        ProxyProcess("--workers", "2", "--worker-urls", engine.url) as proxy,
    ):
        await _send(proxy, 10)
        families = await _families(proxy)
        for name in ("worker_cpu_seconds", "worker_resident_memory_bytes", "worker_open_fds"):
            samples = families[f"doherty_{name}"].samples
            assert {sample.labels["worker"] for sample in samples} == {"0", "1"}
            assert all(sample.value > 0 for sample in samples)
        limits = {sample.value for sample in families["doherty_worker_max_fds"].samples}
        assert len(limits) == 1
        page = (await proxy.admin("/metrics")).body.decode()
        assert "process_resident_memory_bytes " in page
        assert await proxy.metric("doherty_ready") == 1
        async with asyncio.timeout(30):  # until the first sweep
            while not await proxy.metric("doherty_event_loop_delay_seconds_count"):
                await asyncio.sleep(0.1)
        assert await proxy.metric("doherty_build_info", metrics_version="1") == 1


async def test_a_reload_that_fails_is_told_and_one_that_mends_it(tmp_path: Path) -> None:
    config = tmp_path / "proxy.yaml"
    config.write_text("proxy: {log_level: info}\n")
    async with (
        ScriptedEngine(_answer) as engine,
        ProxyProcess("--worker-urls", engine.url, "--config", str(config)) as proxy,
    ):
        name = "doherty_config_last_reload"
        began_s = await proxy.metric(f"{name}_success_timestamp_seconds")
        assert began_s == pytest.approx(os.stat(config).st_mtime, abs=3600)
        config.write_text("proxy: {log_levle: info}\n")
        await proxy.until_said("not reloaded")
        assert await proxy.metric(f"{name}_successful") == 0
        assert await proxy.metric(f"{name}_success_timestamp_seconds") == began_s
        config.write_text("proxy: {log_level: warning}\n")
        await _until(proxy, f"{name}_successful", 1)
        assert await proxy.metric(f"{name}_success_timestamp_seconds") > began_s
        assert await proxy.metric("doherty_config_reloads_total", result="failure") == 1
        assert await proxy.metric("doherty_config_reloads_total", result="success") == 1
