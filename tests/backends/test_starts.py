"""What comes before a process: the release asked for, arguments checked, ports leased."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from backends import keeper as module
from backends.engines.probe import Program
from backends.engines.release import UNKNOWN_RELEASE, Release
from backends.lifecycle import Event, Lifecycle, Phase
from tests.fakes.world import World, configuration

POOL = "[{{engine: vllm, args: [{args}], env: {{PYTHONPATH: '{path}'}}}}]"
PATIENCE_S = 20.0


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A machine with a `vllm` that only says which release it is of."""
    package = tmp_path / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_version.py").write_text('__version__ = version = "0.26.0"\n')
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr("sys.executable", str(tmp_path / "elsewhere" / "python"))
    world = World(tmp_path)
    yield world
    await world.close()


async def start(world: World, args: str = "") -> None:
    pools = POOL.format(args=args, path=world.run_dir / "packages")
    await world.start(configuration(world.run_dir, pools))


def lifecycle(world: World) -> Lifecycle:
    assert world.manager is not None
    return world.manager.keepers["m-0"].state


async def until(world: World, claim: Callable[[], object]) -> None:
    """Wait for a thread. The limit only keeps a broken test from hanging."""
    async with asyncio.timeout(PATIENCE_S):
        while not claim():
            await asyncio.sleep(0.005)
    await world.clock.advance(0.2)


async def test_the_release_is_asked_and_told_and_its_ports_are_published(world: World) -> None:
    await start(world)
    await until(world, lambda: world.provider.spawned)
    (process,), record = world.provider.spawned, world.record()
    assert (record.engine, record.engine_version) == ("vllm", "0.26.0")
    config = json.loads(process.argv[process.argv.index("--kv-events-config") + 1])
    port = int(config["endpoint"].rpartition(":")[2])
    assert record.kv_events == f"tcp://127.0.0.1:{port}"
    assert record.kv_replay == config["replay_endpoint"]
    assert record.kv_topic == config["topic"]
    (launch,) = world.journal.live.values()
    assert launch.ports["kv_events"] == (port, 1)
    assert launch.ports["internal"][0] == int(process.env["VLLM_PORT"])
    assert launch.engine_version == "0.26.0"


@pytest.mark.parametrize("lacking", [False, True])
async def test_an_engine_that_could_not_send_traces_is_not_told_to(
    world: World, lacking: bool
) -> None:
    """It would not start."""
    if lacking:
        folder = world.run_dir / "packages" / "opentelemetry"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    pools = POOL.format(args="", path=world.run_dir / "packages")
    config = configuration(world.run_dir, pools)
    proxy = msgspec.structs.replace(config.proxy, otlp_traces_endpoint="http://c:4318")
    await world.start(msgspec.structs.replace(config, proxy=proxy))
    await until(world, lambda: world.provider.spawned)
    (process,) = world.provider.spawned
    assert ("--otlp-traces-endpoint" in process.argv) is not lacking
    assert ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL" in process.env) is not lacking
    assert ("traces end at the proxy" in world.stream.getvalue()) is lacking


async def test_each_rank_has_a_port_for_its_events(world: World) -> None:
    await start(world, "--data-parallel-size, '4'")
    await until(world, lambda: world.provider.spawned)
    (launch,) = world.journal.live.values()
    first, count = launch.ports["kv_events"]
    assert (count, launch.ports["kv_replay"][1]) == (4, 4)
    assert world.record().kv_events.endswith(f":{first}")


async def test_ports_and_version_are_kept_by_the_manager_after(world: World) -> None:
    await start(world)
    await until(world, lambda: world.provider.spawned)
    before = world.record()
    (launch,) = world.journal.live.values()
    world.provider.left_behind[launch.launch_id] = world.provider.spawned[0]
    assert world.manager is not None
    await world.manager.keepers["m-0"].close()
    await start(world)
    after = world.record()
    assert len(world.provider.spawned) == 1
    assert (after.kv_events, after.kv_replay, after.kv_topic, after.engine_version) == (
        before.kv_events, before.kv_replay, before.kv_topic, before.engine_version,
    )  # fmt: skip


async def test_a_flag_that_the_release_lacks_starts_nothing_and_waits_ever_longer(
    world: World,
) -> None:
    await start(world, "--max-num-sequences, '3'")
    for failures in (1, 2, 3):
        await until(world, lambda: lifecycle(world).phase is Phase.BACKOFF)
        assert lifecycle(world).failures == failures
        await world.clock.advance(4.0 * 2 ** (failures - 1))
    assert not world.provider.spawned
    reason = world.record().reason
    assert "--max-num-sequences" in reason
    assert "did you mean --max-num-seqs?" in reason
    assert not world.journal.live


@pytest.mark.parametrize("stopped", [True, False])
async def test_what_ends_a_start_while_the_release_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """There is no process to end: a stop ends at rest, a kill in the next start."""
    said = threading.Event()
    asked: list[Program] = []

    def slow(program: Program) -> Release:
        asked.append(program)
        said.wait(PATIENCE_S)
        return UNKNOWN_RELEASE

    monkeypatch.setattr(module, "known_release", lambda _: None)
    monkeypatch.setattr(module, "probe_release", slow)
    await start(world)
    await until(world, lambda: asked)
    assert world.manager is not None
    kept = world.manager.keepers["m-0"]
    assert (kept.state.phase, world.record().pid) == (Phase.STARTING, 0)
    if stopped:
        world.manager.reload(configuration(world.run_dir, "[{engine: vllm, replicas: 0}]"))
    else:
        kept.apply(Event.HURRY)
    await world.clock.advance(0.2)
    assert kept.state.phase is (Phase.STOPPED if stopped else Phase.STARTING)
    said.set()
    if not stopped:
        await until(world, lambda: world.provider.spawned)
    await asyncio.sleep(0.05)  # the answer that nobody waits for any more
    await world.clock.advance(0.2)
    assert len(world.provider.spawned) == (0 if stopped else 1)
    assert len(world.journal.live) == (0 if stopped else 1)
