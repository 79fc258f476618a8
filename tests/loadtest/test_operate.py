"""What the operator's run makes of Locust's output: counts, excuses, curves, a page."""

import asyncio
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from typing_extensions import override

from loadtest import operate
from loadtest.__main__ import main
from loadtest.fleet import Fleet, Ports
from loadtest.operate_page import Second, page
from loadtest.replay import WallClock
from loadtest.run import RunError

OUTPUT = """\
[2026-11-27 08:14:15,456] host/INFO/locust.main: Starting Locust 2.47.0
Type     Name                    # reqs      # fails |    Avg     Min     Max    Med |   req/s
--------|-----------------------|-------|-------------|-------|-------|-------|-------|--------
JOB      /v1/batches                   7     0(0.00%) |  42966   31101   66288  40000 |    0.02
POST     /v1/chat/completions       4431    13(0.29%) |    695     348    1632    670 |   14.28
--------|-----------------------|-------|-------------|-------|-------|-------|-------|--------
         Aggregated                 4736    13(0.29%) |    650       2    1632    660 |   15.26

Error report
# occurrences      Error
------------------|---------------------------------------------------------------
12                 POST /v1/chat/completions: in stream: replica_lost (served by demo-0)
1                  POST /v1/chat/completions: 503 no_replica
------------------|---------------------------------------------------------------
[2026-11-27 08:19:15,456] host/INFO/locust.main: late words


goodput: 4359 of 4431 requests (98.4%), 14.05/s
"""
HISTORY = """\
Timestamp,User Count,Type,Name,Requests/s,Failures/s,95%
1000,41,TTFT,/v1/chat/completions,14.0,0.0,N/A
1000,41,,Aggregated,15.0,0.0,630
1001,41,TTFT,/v1/chat/completions,14.0,0.0,90
1001,41,,Aggregated,16.0,1.5,630
"""
EVENTS = (
    operate.Event(at_s=100.2, what="kill -9 of demo-0, which had 12", took_s=4.2, then="it stood"),
    operate.Event(at_s=200.0, what="SIGUSR2: the proxy is rolled", took_s=2.0, then="it had left"),
)


@pytest.fixture
def finding(tmp_path: Path) -> operate.Finding:
    (tmp_path / "locust_stats_history.csv").write_text(HISTORY)
    table = operate.tables_in(OUTPUT)
    return operate.finding_of(tmp_path, table, "demo-0", EVENTS, 998.5)


def test_the_table_is_what_locust_printed_without_its_log() -> None:
    table = operate.tables_in(OUTPUT)
    assert table.startswith("Type ")
    assert table.endswith("14.05/s")
    assert "late words" not in table
    assert "\n\n\n" not in table
    assert operate.tables_in("it did not start") == ""


def test_only_what_the_killed_replica_had_is_excused(finding: operate.Finding) -> None:
    assert (finding.requests, finding.jobs, finding.unexcused) == (4736, 7, 1)
    assert not finding.kept_promises
    excused = msgspec.structs.replace(finding, failures=finding.failures[:1])
    assert excused.kept_promises
    assert not msgspec.structs.replace(excused, jobs=0).kept_promises
    assert not msgspec.structs.replace(excused, killed="demo-00").kept_promises
    said = operate.report(finding)
    assert "failed: 12 that demo-0 had when it was killed, 1 others" in said
    assert "at 100.2 s  kill -9 of demo-0, which had 12; 4.2 s later it stood" in said


def test_curves_are_of_all_requests_and_of_first_tokens(finding: operate.Finding) -> None:
    assert finding.seconds == (
        Second(at_s=1.5, requests_per_s=15.0, failures_per_s=0.0, ttft_p95_ms=0.0),
        Second(at_s=2.5, requests_per_s=16.0, failures_per_s=1.5, ttft_p95_ms=90.0),
    )


class Tags(HTMLParser):
    """Notes what is open; a page must close what it opens, and load nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {"src", "href"} & dict(attrs).keys()
        if tag != "meta":
            self.open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", [0, 1, 300])
def test_the_page_is_whole_small_and_loads_nothing(count: int) -> None:
    seconds = [
        Second(at_s=float(n), requests_per_s=n % 7, failures_per_s=0, ttft_p95_ms=n)
        for n in range(count)
    ]
    text = page("a < b & c", seconds, [(100.0, "kill -9 of <demo>, which had 12")])
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen.count("svg") == 3
    assert "script" not in tags.seen
    assert "a &lt; b &amp; c" in text
    assert "kill -9 of &lt;demo&gt;" in text
    assert len(text) < 60_000


def test_a_folder_that_is_not_there_is_said_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["operate", "--out", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


async def test_the_busiest_replica_is_chosen_once_one_has_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    async def fleet(_: web.Request) -> web.Response:
        known = [{"replica_id": name, "pid": pid} for name, pid in (("a", 1), ("b", 2))]
        return web.json_response({"replicas": known})

    async def replicas(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        counts = {"a": 3, "b": 5, "gone": 9} if asked > 2 else {"a": 0, "b": 0}
        busy = [{"replica_id": name, "inflight": count} for name, count in counts.items()]
        return web.json_response({"replicas": busy})

    app = web.Application()
    app.router.add_get("/v1/fleet", fleet)
    app.router.add_get("/replicas", replicas)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    running = Fleet(
        ports=Ports(proxy=port, admin=port, manager=port), pid=1, workers=1, folder=Path()
    )
    clock = WallClock()
    manager = operate.Client(operate.local(port), clock.now_s)
    monkeypatch.setattr(operate, "POLL_INTERVAL_S", 0.01)
    try:
        victim, had = await operate._busiest(running, manager, clock)
        assert (victim.replica_id, victim.pid, had) == ("b", 2, 5)
        assert asked == 3
        monkeypatch.setattr(operate, "PATIENCE_S", 0.0)
        asked = -1000
        with pytest.raises(RunError, match="no replica had a request"):
            await operate._busiest(running, manager, clock)
    finally:
        manager.close()
        await runner.cleanup()


async def test_a_proxy_is_known_by_how_it_was_started() -> None:
    found = await asyncio.to_thread(operate._proxy_processes, 2**22)
    assert found == set()
    assert operate.PROXY.search("/usr/bin/python -m proxy --port=8000 ")
    assert operate.PROXY.search("/usr/bin/python -P -m proxy.worker 17 3 ")
    assert not operate.PROXY.search("/usr/bin/python -m backends.cli offline --proxy-url=http://h ")
