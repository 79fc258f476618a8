"""Three Doherties, each in a place of its own, and the relays between them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import orjson

from loadtest.client import Client, Target
from loadtest.fleet import MODEL
from loadtest.offline.stage import DOHERTY, program, said
from loadtest.regions.land import Place
from loadtest.replay import WallClock
from loadtest.run import RunError

PROXY, ADMIN, MANAGER, OFFLINE, PEER = 8000, 8001, 8002, 8003, 8004
KEY = "key-of-a-tenant-that-may-go-anywhere"
READY_S_MAX = 90.0
POLL_S = 0.1


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What each region has."""

    round_trips_ms: tuple[float, ...] = (5.0, 80.0, 160.0)  # of the pairs 0-1, 0-2, 1-2
    names: tuple[str, ...] = ("a", "b", "c")
    replicas: int = 1
    max_inputs: int = 16
    profile: str = "h200-8b"
    time_scale: float = 0.25
    linked: bool = True  # else each is an island


def pair_of(one: int, other: int) -> int:
    """Return the number of a pair in `round_trips_ms`."""
    return one + other - 1


def port_of(one: int, other: int, service: int) -> int:
    """Return where the relay from one region to a service of another listens, at the one's gate."""
    return 9000 + 100 * one + 10 * other + service - PROXY


def key_of(region: str) -> str:
    """Return the key of a tenant whose requests may only be computed in one region."""
    return f"key-of-a-tenant-that-stays-in-region-{region}"


class Region:
    """One of them, as a stranger knows it: where it listens."""

    def __init__(self, number: int, shape: Shape, folder: Path) -> None:
        self.number = number
        self.name = shape.names[number]
        self.place = Place(number + 1)
        self.folder = folder / self.name
        self.shape = shape
        self.stop: contextlib.AsyncExitStack | None = None
        self.clock = WallClock()
        self.client = Client(self._target(PROXY), self.clock.now_s, api_key=KEY)
        self.admin = Client(self._target(ADMIN), self.clock.now_s)

    def _target(self, port: int) -> Target:
        return Target(host=self.place.address, port=port, tls=False, path_prefix="")

    def client_with(self, key: str) -> Client:
        return Client(self._target(PROXY), self.clock.now_s, api_key=key)

    def configuration(self) -> dict[str, Any]:
        shape, place = self.shape, self.place
        args = ["--profile", shape.profile, "--time-scale", f"{shape.time_scale:g}"]
        args += ["--max-num-seqs", str(shape.max_inputs)]
        pool = {
            "engine": "simulator",
            "replicas": shape.replicas,
            "args": args,
            "max_inputs": shape.max_inputs,
        }
        remotes = [
            {
                "region": name,
                "url": f"http://{place.gate}:{port_of(self.number, other, PROXY)}",
                "peer": f"{place.gate}:{port_of(self.number, other, PEER)}",
            }
            for other, name in enumerate(shape.names)
            if other != self.number
        ]
        return {
            "region": self.name,
            "remote_regions": remotes if shape.linked else [],
            "tenants": [{"name": "anywhere"}]
            + [{"name": f"only-{name}", "regions": [name]} for name in shape.names],
            "proxy": {
                "host": place.address,
                "port": PROXY,
                "admin_host": place.address,
                "admin_port": ADMIN,
                "peer_listen": f"{place.address}:{PEER}",
                "peer_key": "what the proxies of all three regions know",
                "keys_path": str(self.folder / "keys.json"),
                "access_log": "off",
            },
            "manager": {"port": MANAGER, "run_dir": str(self.folder / "run")},
            "offline": {"enabled": False},
            "models": [{"name": MODEL, "pools": [pool]}],
        }

    def write(self) -> Path:
        """Write its configuration and keys; return the configuration's path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = {"anywhere": KEY} | {f"only-{name}": key_of(name) for name in self.shape.names}
        records = [
            {
                "key_id": f"{number:08d}",
                "tenant": tenant,
                "digest": hashlib.sha256(key.encode()).hexdigest(),
            }
            for number, (tenant, key) in enumerate(keys.items())
        ]
        path = self.folder / "keys.json"
        path.write_bytes(orjson.dumps({"version": 1, "salt": "of three regions", "keys": records}))
        path.chmod(0o600)
        config = self.folder / "doherty.yaml"
        config.write_bytes(orjson.dumps(self.configuration(), option=orjson.OPT_INDENT_2))
        return config

    async def start(self) -> None:
        """Start it; it is ready some time later."""
        command = self.place.within(*DOHERTY, "up", str(self.write()))
        self.stop = contextlib.AsyncExitStack()
        self.log = self.folder / "up.log"
        await self.stop.enter_async_context(program(command, self.log))

    async def until_ready(self) -> None:
        """Raises `RunError`."""
        end_s = self.clock.now_s() + READY_S_MAX
        while not await self.healthy():
            if self.clock.now_s() > end_s:
                raise RunError(
                    f"region {self.name}: not ready in {READY_S_MAX:g} s: {said(self.log)}"
                )
            await asyncio.sleep(POLL_S)

    async def healthy(self) -> bool:
        try:
            async with asyncio.timeout(2.0):
                return (await self.admin.get("/readyz")).status == 200
        except Exception:  # noqa: BLE001 - whatever it is, it is not ready
            return False

    async def metrics(self) -> dict[str, float]:
        """Return its samples by their text up to the value."""
        text = (await self.admin.get("/metrics")).body.decode()
        rows = [row.rpartition(" ") for row in text.splitlines() if row and row[0] != "#"]
        return {name: float(value) for name, _, value in rows}

    async def kill(self) -> None:
        """End all of it without a word."""
        self.place.kill_all()
        assert self.stop is not None
        await self.stop.aclose()
        self.stop = None

    async def close(self) -> None:
        self.client.close()
        self.admin.close()
        if self.stop is not None:
            await self.stop.aclose()
        self.place.close()


@contextlib.asynccontextmanager
async def regions(shape: Shape, folder: Path) -> AsyncIterator[list[Region]]:
    """All of them, ready, and the relays. Raises `RunError`."""
    made = [Region(number, shape, folder) for number in range(len(shape.names))]
    async with contextlib.AsyncExitStack() as stack:
        for region in made:
            stack.push_async_callback(region.close)
            await region.place.build()
        words = []
        for one in made:
            for other in made:
                if one is not other:
                    trip_ms = shape.round_trips_ms[pair_of(one.number, other.number)]
                    for service in (PROXY, PEER):
                        port = port_of(one.number, other.number, service)
                        words.append(
                            f"{one.place.gate}:{port}={other.place.address}:{service}@{trip_ms:g}"
                        )
        folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - once
        log = folder / "relays.log"
        relays = [sys.executable, "-m", "loadtest.regions.relay", *words]
        await stack.enter_async_context(program(relays, log))
        for region in made:
            await region.start()
        for region in made:
            await region.until_ready()
        yield made


def cut_pair(one: Region, other: Region, *, heal: bool = False) -> None:
    """Lose (or no longer lose) every packet between two regions."""
    for near, far in ((one, other), (other, one)):
        ports = [port_of(near.number, far.number, service) for service in (PROXY, PEER)]
        (near.place.heal if heal else near.place.cut)(ports)


def difference(before: Mapping[str, float], after: Mapping[str, float], words: str) -> float:
    """Return by how much the counters grew whose text begins so."""
    return sum(
        value - before.get(name, 0.0) for name, value in after.items() if name.startswith(words)
    )
