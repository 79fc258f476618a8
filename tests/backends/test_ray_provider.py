"""What the manager's side keeps while the bridge to Ray comes and goes."""

from __future__ import annotations

import asyncio
import io
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.cluster_cards import Node
from backends.journal import Launch
from backends.log import Log
from backends.providers import ray as subject
from backends.providers.ray import RayProcess, RayProvider, bridge_environment
from backends.providers.ray_words import Connected, Exited, Order, Runs, Said, Waits
from proxy.config import RayConfig


class FakeBridge:
    """The pipe to a bridge, as far as it is written to."""

    def __init__(self) -> None:
        self.stdin = self
        self.orders: list[Order] = []

    def write(self, line: bytes) -> None:
        self.orders.append(msgspec.json.decode(line, type=Order))  # type: ignore[arg-type]

    @property
    def words(self) -> list[str]:
        return [type(order).__name__ for order in self.orders]


class Stage:
    """A provider without a cluster, and launches of a journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launches: dict[str, Launch] = {}
        config = RayConfig(address="10.0.0.1:6379")
        log = Log(io.StringIO())
        self.provider = RayProvider(config, "ns", config.address, folder, self.launches, log)

    def spawn(self, launch_id: str = "a") -> RayProcess:
        self.launches[launch_id] = Launch(
            launch_id=launch_id,
            replica_id="m-0",
            launch_hash="",
            engine="vllm",
            model="m",
            pool="m",
            port=20_000,
            ports={"kv_events": (20_010, 2)},
            stop_grace_s=1.0,
            starts=1,
            at_s=0.0,
            gpus_wanted=2,
        )
        log_path = self.folder / "m-0.log"
        process = self.provider.spawn(("vllm", "serve"), {"A": "1"}, launch_id, log_path)
        assert isinstance(process, RayProcess)
        return process

    def bridge(self, *found: str) -> FakeBridge:
        bridge: Any = FakeBridge()
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.provider._reached(bridge, Connected(found, (Node("10.0.0.7", 2, 2),)), connected)
        assert connected.done()
        fake: FakeBridge = bridge
        return fake

    def lose(self) -> None:
        self.provider._bridge = None
        self.provider._lost("it is gone")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_what_is_ordered_without_a_bridge_is_ordered_of_the_next(stage: Stage) -> None:
    stage.lose()
    process = stage.spawn()
    assert process.waits == "the Ray cluster does not answer (it is gone)"
    process.signal_group(signal.SIGTERM)
    bridge = stage.bridge()
    assert bridge.words == ["Start", "Signal"]
    start = bridge.orders[0]
    assert isinstance(start, subject.Start)
    assert start.ports == (20_000, 20_010, 20_011)
    assert start.need.bundle == {"GPU": 2.0}
    assert process.waits == ""


async def test_what_runs_is_followed_by_the_next_bridge_and_not_begun_again(stage: Stage) -> None:
    stage.bridge()
    process = stage.spawn()
    stage.provider._take(Waits("a", "waits for 2 GPUs"))
    assert process.waits == "waits for 2 GPUs"
    stage.provider._take(Runs("a", "10.0.0.7", "node", 17))
    assert process.waits == ""
    assert process.placed.result() == "10.0.0.7"
    stage.lose()
    assert not process.exited.done()  # silence of the cluster is no end
    assert process.waits == ""
    assert stage.bridge().words == ["Follow"]


async def test_its_log_is_octets_and_a_gap_is_told(stage: Stage, tmp_path: Path) -> None:
    process = stage.spawn()
    stage.provider._take(Said("a", "é\n".encode().decode("latin-1")))
    stage.provider._take(Said("a", "on\n", 12))
    stage.provider._take(Exited("a", status=signal.SIGTERM))
    assert (tmp_path / "m-0.log").read_text() == "é\n[12 octets lost]\non\n"
    assert process.exited.result() == "killed by SIGTERM"
    assert process.placed.cancelled()
    stage.provider._take(Said("a", "late"))  # nobody listens


async def test_one_that_is_let_go_still_runs(stage: Stage) -> None:
    process = stage.spawn()
    assert not stage.provider.empty
    process.release()
    assert not stage.provider.empty  # so a cluster of our own is not ended
    ended = stage.spawn("b")
    stage.provider._take(Exited("b", status=0))
    ended.release()
    assert stage.provider._left == {"a"}


async def test_what_is_not_known_is_ended_by_each_bridge(stage: Stage) -> None:
    stage.bridge("a", "stray")
    stage.spawn()
    found = stage.provider.recover(stage.launches.values())
    assert set(found) == {"a"}
    bridge = stage.bridge()
    assert bridge.words == ["Follow", "Keep"]
    assert isinstance(bridge.orders[1], subject.Keep)
    assert bridge.orders[1].launch_ids == ("a",)


async def test_one_that_is_to_die_is_given_up_where_nobody_answers(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "LOST_KILL_S_MAX", 0.01)
    process = stage.spawn()
    process.signal_group(signal.SIGKILL)
    assert await process.exited == "given up: its cluster does not answer"
    await stage.provider.close()


@pytest.mark.parametrize(("auth", "token"), [("token", "t"), ("disabled", None)])
def test_ray_is_told_explicitly_who_may_speak(auth: str, token: str | None) -> None:
    environ = {"RAY_AUTH_TOKEN": "t", "DOHERTY_API_KEY": "k", "PATH": "/bin"}
    told = bridge_environment(environ, auth)
    assert told["RAY_AUTH_MODE"] == auth
    assert told.get("RAY_AUTH_TOKEN") == token
    assert told["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "DOHERTY_API_KEY" not in told
