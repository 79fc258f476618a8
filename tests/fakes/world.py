"""A manager over a fake provider, fake answers and a clock that the test holds."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping
from pathlib import Path

from backends.cards import Cards
from backends.engines import ENGINES
from backends.engines.base import Engine, launch_hash
from backends.journal import Journal, Launch, Ready, Started
from backends.log import Log
from backends.manager import Manager
from backends.spec import pool_specs
from backends.surroundings import Demanded
from proxy.config import Config, parse_config
from proxy.contract import ReplicaRecord
from tests.fakes.provider import FakeFetch, FakeProcess, FakeProvider, ManualClock
from tests.fakes.snapshots import FakeSnapshots
from tests.fakes.suspender import FakeDemand, FakeSuspender


def configuration(run_dir: Path, pools: str = "[{engine: simulator, replicas: 2}]") -> Config:
    return parse_config(
        f"manager: {{run_dir: '{run_dir}', restart_backoff_secs: 4}}\n"
        f"models: [{{name: m, pools: {pools}}}]",
        "test",
    )


class World:
    """A manager and everything around it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.clock = ManualClock()
        self.provider = FakeProvider()
        self.fetch = FakeFetch()
        self.stream = io.StringIO()
        self.journal = Journal(run_dir / "journal")
        self.config = configuration(run_dir)
        self.cards: Cards | None = None
        self.suspender = FakeSuspender()
        self.snapshots = FakeSnapshots()
        self.engines: Mapping[str, Engine] = ENGINES
        self.demand: Demanded = FakeDemand()
        self.manager: Manager | None = None

    async def start(self, config: Config | None = None) -> Manager:
        self.config = config or self.config
        self.manager = Manager(
            self.config,
            provider=self.provider,
            fetch=self.fetch,
            journal=self.journal,
            log=Log(self.stream),
            clock=self.clock,
            cards=self.cards,
            engines=self.engines,
            snapshots=self.snapshots,
            suspender_of=lambda _engine: self.suspender,
            demand=self.demand,
        )
        starting = self.manager.start()

        task = asyncio.ensure_future(starting)
        await self.clock.advance(0.2)
        await task
        await self.clock.advance(0.2)
        return self.manager

    async def close(self) -> None:
        if self.manager is not None:
            await self.manager.close()
        self.journal.close()

    def record(self, index: int = 0) -> ReplicaRecord:
        assert self.manager is not None
        return self.manager.feed.snapshot.replicas[index]

    def states(self) -> list[str]:
        assert self.manager is not None
        return [record.state.value for record in self.manager.feed.snapshot.replicas]

    def events(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def leave_behind(self, replica_id: str, pools: str, *, ready: bool = True) -> FakeProcess:
        """Be the manager before: journal a life of the first replica of `pools`."""
        spec = pool_specs(configuration(self.run_dir, pools))[0].first
        launch = Launch(
            launch_id="before-" + replica_id,
            replica_id=replica_id,
            launch_hash=launch_hash(ENGINES[spec.engine], spec),
            engine=spec.engine,
            model="m",
            pool="m",
            port=20_500,
            stop_grace_s=7.0,
            starts=2,
            at_s=1.0,
        )
        process = FakeProcess(77, (), {})
        self.journal.append(launch)
        self.journal.append(Started(launch.launch_id, 77, 770, "boot-1"))
        if ready:
            self.journal.append(Ready(launch.launch_id))
        self.provider.left_behind[launch.launch_id] = process
        return process
