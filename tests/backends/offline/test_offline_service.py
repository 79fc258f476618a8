"""The life of the service: models read anew, a chore that dies, trouble with the store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from backends.clock import SystemClock
from backends.log import Log
from backends.offline.records import UnavailableError
from backends.offline.service import OfflineService, listen, open_store
from backends.offline.setting import Setting
from backends.offline.store import Store
from backends.serve import Orders
from proxy.config import parse_config
from tests.fakes.offline_stage import (
    CHAT,
    CONFIG,
    PATIENCE_S,
    Stage,
    jsonl,
    offline_stage,
    request,
    until_state,
)


async def _state_of_a_batch_for(stage: Stage, model: str) -> str:
    async with stage.client() as client:
        line = request(0, body={"model": model, "messages": []})
        file = await client.files.create(file=("a", jsonl([line])), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        return str((await until_state(client, batch.id, "in_progress", "failed")).status)


async def test_models_are_read_anew_and_a_faulty_file_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    async with offline_stage(tmp_path, config_path=str(path)) as stage:
        said = ""
        for text, event in ((CONFIG.replace("demo", "new"), "reload_done"), ("{", "reload_failed")):
            path.write_text(text)
            stage.orders.reload.set()
            async with asyncio.timeout(PATIENCE_S):
                while event not in (said := said + capsys.readouterr().err):
                    await asyncio.sleep(0.01)
        assert await _state_of_a_batch_for(stage, "new") == "in_progress"
        assert await _state_of_a_batch_for(stage, "demo") == "failed"


async def _run(folder: Path) -> tuple[Orders, asyncio.Future[int], Store]:
    setting = Setting(
        config=parse_config(CONFIG + f"manager: {{run_dir: {folder}}}", "the test"),
        config_path=None,
        manager_url=None,
        proxy_url=None,
    )
    clock, orders = SystemClock(), Orders()
    store = await open_store(setting, clock)
    service = OfflineService(setting, store, clock, Log())
    return orders, asyncio.ensure_future(service.run(listen("127.0.0.1", 0), orders)), store


async def test_no_line_is_sent_to_a_proxy_that_demands_a_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"manager: {{run_dir: {tmp_path}}}\n"
    config = parse_config(CONFIG + run + "proxy: {tls_client_auth: required}", "the test")
    setting = Setting(
        config=config,
        config_path=None,
        manager_url="http://127.0.0.1:9",
        proxy_url="https://127.0.0.1:9",
    )
    store = await open_store(setting, SystemClock())
    service = OfflineService(setting, store, SystemClock(), Log())
    assert service._dispatcher is None
    assert "lines of batches have no client certificate" in capsys.readouterr().err
    await store.close()


async def test_a_service_whose_chore_dies_ends_to_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(_self: Store) -> int:
        raise RuntimeError("nobody expects this")

    monkeypatch.setattr(Store, "finish_due", broken)
    _, running, store = await _run(tmp_path)
    assert await asyncio.wait_for(running, PATIENCE_S) == 1
    assert "nobody expects this" in capsys.readouterr().err
    await store.close()


async def test_a_store_that_is_away_is_waited_for_and_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    async def away(_self: Store) -> int:
        nonlocal calls
        calls += 1
        raise UnavailableError("nobody answers")

    monkeypatch.setattr(Store, "finish_due", away)
    monkeypatch.setattr("backends.offline.service.FINISH_INTERVAL_S", 0.01)
    orders, running, store = await _run(tmp_path)
    async with asyncio.timeout(PATIENCE_S):
        while calls < 5:
            await asyncio.sleep(0.01)
    orders.stop.set()
    assert await asyncio.wait_for(running, PATIENCE_S) == 0
    await store.close()
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events.count("finishing_failed") == 1
