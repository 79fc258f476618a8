"""Adapters that change while replicas serve, sleep or start; calls that fail; managers that die."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec
import pytest

from backends.adapters import Loaded
from backends.fetch import Answer
from backends.journal import Adapted
from backends.keeper import RefusedError
from backends.ladder import Rung
from backends.lifecycle import Phase
from tests.fakes.world import World, configuration

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    world.fetch.answers["/is_sleeping"] = Answer(200, b'{"is_sleeping": true}')
    yield world
    await world.close()


def pools(*names: str, more: str = "") -> str:
    adapters = ", ".join(f"{name}: /{name}" for name in names)
    return f"[{{engine: simulator, adapters: {{{adapters}}}{more}}}]"


def reload(world: World, wanted: str) -> None:
    assert world.manager is not None
    world.manager.reload(configuration(world.run_dir, wanted))


def lists(world: World, names: Iterable[str]) -> None:
    rows = [{"id": "m", "parent": None}, *({"id": name, "parent": "m"} for name in names)]
    world.fetch.answers["/v1/models"] = Answer(200, msgspec.json.encode({"data": rows}))


def told(world: World) -> list[tuple[str, str]]:
    """Return the calls about adapters: path and name."""
    calls = zip(world.fetch.posted, world.fetch.bodies, strict=True)
    return [
        ("/" + url.split("/", 3)[3], msgspec.json.decode(body)["lora_name"])
        for url, body in calls
        if url.endswith("_lora_adapter")
    ]


def loaded(world: World) -> Loaded:
    (launch,) = world.journal.live.values()
    return launch.loras


def has(names: str, spent: str, *, settled: bool = True) -> Loaded:
    return Loaded({name: f"/{name}" for name in names}, tuple(spent), settled, room=True)


async def test_a_ready_one_is_told_and_its_names_are_published_at_once(world: World) -> None:
    lists(world, ["a"])
    await world.start(configuration(world.run_dir, pools("a")))
    assert (world.record().models, loaded(world)) == (("m", "a"), has("a", spent="a"))
    lists(world, ["b", "c"])
    reload(world, pools("b", "c"))
    await world.clock.advance(0.1)
    assert told(world) == [(UNLOAD, "a"), (LOAD, "b"), (LOAD, "c")]
    record = world.record()
    assert (record.state.value, record.models) == ("ready", ("m", "b", "c"))
    assert loaded(world) == has("bc", spent="abc")
    assert (len(world.provider.spawned), world.provider.spawned[0].signals) == (1, [])
    changed = [e for e in world.events() if e["event"] == "replica_adapters_changed"]
    assert [e["calls"] for e in changed] == [["unload 'a'", "load 'b'", "load 'c'"]]
    await world.clock.advance(60.0)
    assert len(told(world)) == 3, "and then it has them"


async def test_a_change_during_a_change_follows_it(world: World) -> None:
    await world.start(configuration(world.run_dir, pools("a")))
    world.fetch.answering.clear()
    reload(world, pools("a", "b"))
    await world.clock.advance(0.1)
    reload(world, pools("b", "c"))
    await world.clock.advance(0.1)
    assert told(world) == [(LOAD, "b")], "which is not answered yet"
    world.fetch.answering.set()
    await world.clock.advance(0.1)
    assert told(world) == [(LOAD, "b"), (UNLOAD, "a"), (LOAD, "c")]
    assert len(world.provider.spawned) == 1


async def test_one_that_starts_is_told_once_it_is_ready(world: World) -> None:
    world.fetch.answers["/health"] = Answer(503)
    await world.start(configuration(world.run_dir, pools("a")))
    reload(world, pools("a", "b"))
    await world.clock.advance(5.0)
    assert (told(world), world.states()) == ([], ["starting"])
    world.fetch.answers["/health"] = Answer(200)
    await world.clock.advance(2.0)
    assert (told(world), len(world.provider.spawned)) == ([(LOAD, "b")], 1)


async def test_one_that_sleeps_is_told_once_it_is_awake(world: World) -> None:
    sleepy = ", sleep: true"
    manager = await world.start(configuration(world.run_dir, pools("a", more=sleepy)))
    manager.keepers["m-0"].lower(Rung.ASLEEP, "asked", 1)
    await world.clock.advance(1.0)
    reload(world, pools("a", "b", more=sleepy))
    await world.clock.advance(10.0)
    assert (told(world), manager.keepers["m-0"].state.phase) == ([], Phase.ASLEEP)
    world.fetch.answers["/is_sleeping"] = Answer(200, b'{"is_sleeping": false}')
    manager.keepers["m-0"].raise_("asked")
    await world.clock.advance(2.0)
    assert (told(world), world.states()) == ([(LOAD, "b")], ["ready"])


async def test_meanwhile_it_is_not_put_to_sleep(world: World) -> None:
    sleepy = ", sleep: true"
    manager = await world.start(configuration(world.run_dir, pools("a", more=sleepy)))
    reload(world, pools("b", more=sleepy))
    with pytest.raises(RefusedError, match="its adapters are being changed"):
        manager.keepers["m-0"].lower(Rung.ASLEEP, "asked", 1)
    await world.clock.advance(0.1)
    manager.keepers["m-0"].lower(Rung.ASLEEP, "asked", 1)


async def test_a_call_that_fails_is_told_and_they_are_started_anew_in_turn(world: World) -> None:
    twice = ", replicas: 2"
    world.fetch.answers["POST " + LOAD] = Answer(404, b"No adapter found for b")
    await world.start(configuration(world.run_dir, pools("a", more=twice)))
    reload(world, pools("b", "c", more=twice))
    await world.clock.advance(0.1)
    assert told(world) == [(UNLOAD, "a"), (LOAD, "b")] * 2
    assert sorted(world.states()) == ["draining", "ready"]
    failed = [e for e in world.events() if e["event"] == "replica_adapters_failed"]
    assert {e["replica"] for e in failed} == {"m-0", "m-1"}
    why = f"POST {LOAD} (load 'b'): answered 404: No adapter found for b"
    assert failed[0]["reason"].endswith(why)
    await world.clock.advance(1.0)
    first, second = world.provider.spawned
    assert (first.signals, second.signals) == ([signal.SIGTERM], [])
    first.exit("exited")
    await world.clock.advance(2.0)
    assert second.signals == [signal.SIGTERM], "now that the other is back"
    second.exit("exited")
    await world.clock.advance(2.0)
    assert world.states() == ["ready", "ready"]
    assert [{"b", "c"} <= set(p.argv) for p in world.provider.spawned] == [False] * 2 + [True] * 2
    assert len(told(world)) == 4


async def test_one_that_was_started_without_any_is_started_anew(world: World) -> None:
    await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    assert loaded(world) == Loaded()
    reload(world, pools("a"))
    await world.clock.advance(1.0)
    assert (told(world), world.provider.spawned[0].signals) == ([], [signal.SIGTERM])


async def test_where_calls_would_reach_one_server_of_two_it_is_started_anew(world: World) -> None:
    ranks = ", args: [--data-parallel-size, '2']"
    await world.start(configuration(world.run_dir, pools("a", more=ranks)))
    await world.clock.advance(5.0)
    process = world.provider.spawned[0]
    assert (world.states(), process.signals) == (["ready"], []), "it has what is wanted"
    reload(world, pools("b", more=ranks))
    await world.clock.advance(1.0)
    assert (told(world), process.signals) == ([], [signal.SIGTERM])


async def test_a_name_with_other_weights_needs_a_start_of_vllm_only(world: World) -> None:
    """SGLang's prefix cache knows an adapter by the load, vLLM's by the name."""
    for args in ("", ", args: [--dialect, sglang]"):
        name = "s" if args else "v"
        reload_to = f"[{{engine: simulator, name: {name}, adapters: {{a: /other}}{args}}}]"
        pool = reload_to.replace("/other", "/a")
        if world.manager is None:
            await world.start(configuration(world.run_dir, pool))
        else:
            reload(world, pool)
            await world.clock.advance(1.0)
        reload(world, reload_to)
        await world.clock.advance(1.0)
        signals = world.provider.spawned[-1].signals
        assert signals == ([] if args else [signal.SIGTERM])
    assert told(world) == [("/unload_lora_adapter", "a"), ("/load_lora_adapter", "a")]


@pytest.mark.parametrize("settled", [True, False])
async def test_a_manager_knows_what_the_one_before_had_loaded(world: World, settled: bool) -> None:
    process = world.leave_behind("m-0", pools("a"))
    world.journal.append(Adapted("before-m-0", has("b", spent="ab", settled=settled)))
    await world.start(configuration(world.run_dir, pools("b", "c")))
    await world.clock.advance(1.0)
    if settled:
        assert (told(world), process.signals) == ([(LOAD, "c")], [])
        assert loaded(world) == has("bc", spent="abc")
    else:
        assert (told(world), process.signals) == ([], [signal.SIGTERM]), "it died meanwhile"


async def test_an_end_during_the_calls_ends_them(world: World) -> None:
    manager = await world.start(configuration(world.run_dir, pools("a")))
    world.fetch.answering.clear()
    reload(world, pools("b"))
    await world.clock.advance(0.1)
    world.provider.spawned[0].exit("killed by SIGKILL")
    world.fetch.answering.set()
    await world.clock.advance(0.1)
    assert (told(world), world.states()) == ([(UNLOAD, "a")], ["backoff"])
    await world.clock.advance(5.0)
    assert (world.states(), manager.keepers["m-0"].observed.adapting) == (["ready"], False)
    assert loaded(world) == has("b", spent="b"), "of the new life"
    assert "replica_adapters_failed" not in {e["event"] for e in world.events()}
