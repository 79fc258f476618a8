"""Who wants his tokens soon goes to the engine that makes them soon, as it was seen to do."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from proxy.contract import ReplicaRecord
from tests.fakes.plane import RealPlane
from tests.fakes.simulator import simulator


async def test_a_time_between_tokens_is_learned_and_kept_where_it_can_be() -> None:
    async with (
        simulator(time_scale=8.0) as fast,
        simulator(time_scale=0.25) as slow,
        aiohttp.ClientSession() as session,
    ):
        engines = (("fast", fast), ("slow", slow))
        found = [
            ReplicaRecord(replica_id=name, url=each.url, models=("demo",)) for name, each in engines
        ]
        async with RealPlane(found, expose_routing=True) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/v1/chat/completions"

            async def ask(name: str, **fields: str) -> str:
                body: dict[str, Any] = {"model": "demo", "max_tokens": 24, "stream": True}
                body["messages"] = [{"role": "user", "content": name}]
                body["stream_options"] = {"include_usage": True}
                data = json.dumps(body)
                async with session.post(url, data=data, headers=fields) as response:
                    await response.read()
                    return response.headers["x-doherty-replica"]

            seen = [await ask(f"learn {n}") for n in range(8)]
            assert set(seen) == {"fast", "slow"}  # equal otherwise: both are taken
            pacing, slots = proxy.plane.picture.loads.pacing, proxy.plane.picture.slots
            between = {name: pacing.expected_s(slots[name], 1) for name in slots}
            assert between["slow"] > 2 * between["fast"]
            wanted_ms = 1e3 * (between["slow"] + between["fast"]) / 2
            fields = {"x-slo-tpot-ms": f"{wanted_ms:.3f}"}
            assert {await ask(f"soon {n}", **fields) for n in range(6)} == {"fast"}
            late = {"x-slo-tpot-ms": f"{between['fast'] * 1e3 / 50:.6f}"}
            assert await ask("too soon for all", **late) == "fast"
