"""What a comparison starts, and what it says when that does not come up."""

import json
import os
import sys
import time
from pathlib import Path

import msgspec
import orjson
import pytest

from loadtest import compare
from loadtest.client import Client, parse_url
from loadtest.fleet import (
    FleetOptions,
    Ports,
    find_doherty,
    fleet,
    fleet_config,
    free_ports,
)
from loadtest.policies import beside
from loadtest.policies.beside import Seen, Setting
from loadtest.rest import left_over
from loadtest.run import Options, RunError, load_trace
from proxy.config import parse_config
from tests.loadtest.test_report import made_run

PORTS = Ports(proxy=1001, admin=1002, manager=1003)
FAKE = Path(__file__).parents[1] / "fakes" / "doherty_command.py"


def test_the_configuration_is_one_that_doherty_reads(tmp_path: Path) -> None:
    options = FleetOptions(
        replicas=3, workers=2, kv_cache_tokens=50_000, time_scale=2.0, stream_interval=8
    )
    value = fleet_config("round_robin", options, PORTS, str(tmp_path))
    config = parse_config(orjson.dumps(value).decode(), "generated")
    assert (config.proxy.port, config.proxy.admin_port, config.manager.port) == (1001, 1002, 1003)
    assert (config.proxy.policy, config.proxy.workers) == ("round_robin", 2)
    assert config.manager.run_dir == str(tmp_path)
    (pool,) = config.models[0].pools
    assert (pool.engine, pool.replicas) == ("simulator", 3)
    assert pool.args == (
        *("--profile", "h200-8b", "--max-model-len", "131072", "--kv-cache-tokens", "50000"),
        *("--time-scale", "2", "--stream-interval", "8"),
    )


def test_nothing_but_the_policy_differs_between_runs() -> None:
    one = fleet_config("prefix", FleetOptions(), PORTS, "d")
    other = fleet_config("random", FleetOptions(), PORTS, "d")
    assert one != other
    other["proxy"]["policy"] = "prefix"
    assert one == other
    assert one["models"][0]["pools"][0]["args"][:2] == ["--profile", "h200-8b"]


def test_ports_are_free_and_different() -> None:
    ports = free_ports()
    assert len({ports.proxy, ports.admin, ports.manager}) == 3


def test_the_command_is_the_installed_one_or_the_named_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_doherty("a 'b c'") == ["a", "b c"]
    beside = tmp_path / "doherty"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(RunError, match="no command `doherty`"):
        find_doherty("")
    beside.write_text("")
    assert find_doherty("") == [str(beside)]


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("doherty-compare-*")]


async def test_a_fleet_comes_up_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = FleetOptions(replicas=2, doherty=f"{sys.executable} {FAKE}")
    async with fleet("prefix", options) as running:
        manager = f"http://127.0.0.1:{running.ports.manager}"
        client = Client(parse_url(manager), time.perf_counter)
        page = json.loads((await client.get("/v1/fleet")).body)
        client.close()
        assert page["version"] > 3  # asked again after it said "starting"
        assert len(leftovers(tmp_path)) == 1
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "timeout", "problem"),
    [
        (f"{sys.executable} {FAKE} --exit 3", 60.0, "ended with 3: port 8000 is in use"),
        (f"{sys.executable} -c 'import signal; signal.pause()'", 0.3, "not ready in 0.3 s"),
        ("/nonexistent/doherty", 60.0, "/nonexistent/doherty: cannot be started: No such file"),
    ],
    ids=["fails", "hangs", "missing"],
)
async def test_a_fleet_that_does_not_come_up_says_why(
    command: str,
    timeout: float,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = FleetOptions(doherty=command, start_timeout=timeout)
    with pytest.raises(RunError, match=problem):
        async with fleet("prefix", options):
            pytest.fail("it must not become ready")


async def test_a_fleet_that_does_not_stop_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("loadtest.fleet.STOP_TIMEOUT_S", 0.2)
    pid_file = tmp_path / "pid"
    script = tmp_path / "deaf.py"
    script.write_text(
        "import os, runpy, signal, sys\n"
        "mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        f"sys.argv[0] = {str(FAKE)!r}\n"
        f"runpy.run_path({str(FAKE)!r}, run_name='__main__')\n"
    )
    with pytest.raises(RunError, match="did not stop"):
        async with fleet("prefix", FleetOptions(doherty=f"{sys.executable} {script}")):
            pass
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


async def test_a_proxy_that_says_nothing_of_its_leases_is_not_at_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RunError, match="without leases, leases_of_others"):
        await left_over(free_ports().admin)
    monkeypatch.setattr("loadtest.rest.REST_TIMEOUT_S", 0.0)
    options = FleetOptions(doherty=f"{sys.executable} {FAKE} --leases 2")
    async with fleet("prefix", options) as running:
        assert await left_over(running.ports.admin) == {"leases": 2}


def test_what_a_proxy_must_not_do() -> None:
    run = made_run("prefix")
    left = msgspec.structs.replace(run, left={"leases": 1, "queue_depth": 2})
    assert compare.broken_promises({"prefix": [run, left]}) == [
        "prefix: 1 requests failed: cut",
        "prefix: 1 requests failed: cut",
        "prefix: not back to zero: leases 1, queue_depth 2",
    ]
    whole = msgspec.structs.replace(run, outcomes=run.outcomes[:-1])
    assert compare.broken_promises({"prefix": [whole]}) == []


def test_the_order_here_and_in_the_lab() -> None:
    runs = {"slow": [made_run(ttft_s=3.0)], "fast": [made_run(ttft_s=0.5), made_run(ttft_s=0.7)]}
    seen = compare.in_engine_seconds(runs, 2.0)
    assert list(seen) == ["slow", "fast"]
    assert seen["fast"].ttft_p95_s == pytest.approx(1.2)  # both runs' median, in engine seconds
    assert seen["fast"].hit == 0.6
    same = beside.compare(seen, {"slow": Seen(30.0, 0.1, 0.2), "fast": Seen(1.0, 0.1, 0.2)})
    assert list(same.seen) == list(same.lab) == ["fast", "slow"]
    assert not same.disagreements
    assert beside.table(same).endswith("the same order")
    near = beside.compare(seen, {"slow": Seen(1.0, 0.1, 0.2), "fast": Seen(1.1, 0.1, 0.2)})
    assert not near.disagreements
    assert beside.table(near).endswith("but for those that are too near to have one: fast and slow")
    other = beside.compare(seen, {"slow": Seen(1.0, 0.1, 0.2), "fast": Seen(1.5, 0.1, 0.2)})
    assert beside.table(other).endswith("another order: slow and fast")


def test_the_lab_takes_the_same_requests_at_the_same_pace() -> None:
    trace = load_trace(Options(limit=150))
    policies = ["round_robin", "prefix"]
    quick = Setting(replicas=4, workers=2, kv_cache_tokens=750_000, speed=6.0, time_scale=2.0)
    beside.check(policies)
    found = beside.in_the_lab(trace, policies, quick)
    as_slow = msgspec.structs.replace(quick, speed=3.0, time_scale=1.0)
    assert beside.in_the_lab(trace, policies, as_slow) == found
    assert found["prefix"].ttft_p95_s < found["round_robin"].ttft_p95_s
    with pytest.raises(ValueError, match="doherty:nonsense"):
        beside.check(["nonsense"])
