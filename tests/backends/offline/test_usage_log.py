"""What engine workers compute for tenants is written as a proxy writes it, once."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from backends.clock import SystemClock
from backends.log import Log
from backends.offline import usage_log
from backends.offline.store import Store
from backends.offline.usage_log import UsageLog
from backends.offline.work import Report, Result
from proxy.config_access import ModelAccess
from proxy.contract.usage import decode_usage
from tests.fakes.stored_jobs import ask, begun_job

PRICES = {"m": ModelAccess(prompt_price=2.0, cached_price=1.0, completion_price=10.0)}


def made(path: Path | str, log: Log | None = None) -> UsageLog:
    return UsageLog(str(path), "eu", PRICES, SystemClock(), log or Log(io.StringIO()))


def result(job_id: str, number: int) -> Result:
    return Result(
        job_id=job_id, number=number, status=200, request_id="r", prompt_tokens=1000,
        cached_tokens=400, completion_tokens=100,
    )  # fmt: skip


async def test_each_result_that_counts_is_written_once(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "offline.db")
    books = made(tmp_path / "usage.jsonl")
    store.on_taken = books.take
    try:
        await begun_job(store, 2, tenant="acme")
        chunk = await ask(store, "w")
        assert chunk is not None
        for _ in range(2):  # the second time nothing of it counts
            report = Report(
                worker_id="w", chunk_id=chunk.chunk_id, fence=chunk.fence,
                results=tuple(result(line.job_id, line.number) for line in chunk.lines),
            )  # fmt: skip
            await store.report(report)
    finally:
        await store.close()
    books.flush()
    books.flush()
    lines = (tmp_path / "usage.jsonl").read_bytes().splitlines()
    first, second = map(decode_usage, lines)
    assert (first.tenant, first.key_id, first.model, first.work_class, first.region) == (
        *("acme", "internal", "m", "offline"),
        "eu",
    )
    assert (first.prompt_tokens, first.cached_tokens, second.completion_tokens) == (1000, 400, 100)
    assert first.cost == pytest.approx((600 * 2.0 + 400 * 1.0 + 100 * 10.0) / 1e6)
    assert (tmp_path / "usage.jsonl").stat().st_mode & 0o777 == 0o640


def test_what_passes_a_proxy_is_the_proxys_to_write(tmp_path: Path) -> None:
    books = made(tmp_path / "usage.jsonl")
    books.take("spare-1:m", [("acme", "m", result("j", 0))])
    books.flush()
    nothing = Result(job_id="j", number=1, status=400)
    books.take("w", [("acme", "m", nothing)])
    books.flush()
    assert not (tmp_path / "usage.jsonl").exists()
    made("off").take("w", [("acme", "m", result("j", 0))])


def test_half_a_line_costs_no_record_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "usage.jsonl", os.write
    books = made(path)
    books.take("w", [("acme", "m", result("j", number)) for number in range(4)])
    monkeypatch.setattr(os, "write", lambda fd, octets: whole(fd, octets[: len(octets) * 5 // 8]))
    books.flush()
    monkeypatch.setattr(os, "write", whole)
    books.flush()
    lines = [line for line in path.read_bytes().split(b"\n") if line]
    good = [line for line in lines if line.endswith(b"}")]
    assert (len(lines), len(good)) == (5, 4)
    assert all(decode_usage(line).tenant == "acme" for line in good)


def test_a_disk_that_fails_is_told_once_and_loses_what_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_log, "RECORDS_MAX", 3)
    told = io.StringIO()
    path = tmp_path / "none" / "usage.jsonl"
    books = made(path, Log(told))
    for number in range(5):
        books.take("w", [("acme", "m", result("j", number))])
        books.flush()
    assert books.dropped == 2
    events = [json.loads(line)["event"] for line in told.getvalue().splitlines()]
    assert events == ["usage_not_written"]
    path.parent.mkdir()
    books.flush()
    assert len(path.read_bytes().splitlines()) == 3
