"""The manager: reads what is wanted, looks at what runs, and lets `reconcile` say what to do.

It remembers nothing only in memory. What it started is in the journal, so a manager that was killed
is followed by one that adopts; what is wanted is in the configuration; how the replicas are is
asked of them. `serve.py` gives it a process, signals and a listener.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from backends.autoscale import Autoscaler
from backends.cards import Cards
from backends.clock import Clock
from backends.demand import DemandBook
from backends.engines import ENGINES
from backends.engines.base import Engine
from backends.feed import Feed, Told
from backends.fetch import Fetch
from backends.journal import Ended, Journal, Launch
from backends.keeper import Keeper
from backends.lifecycle import Event
from backends.log import Log
from backends.logfile import bound
from backends.moves import Follows, Nobody
from backends.notices import Reclaims
from backends.providers.base import Process, Provider
from backends.providers.choice import port_leases, warms
from backends.readahead import Lists
from backends.reconcile import (
    Adapt,
    Create,
    Lower,
    Raise,
    Remove,
    Restart,
    Start,
    Stop,
    Update,
    Wanted,
    reconcile,
)
from backends.snapshots.absent import NoSnapshots, NoSuspender
from backends.snapshots.base import Snapshots, Suspender
from backends.spec import ReplicaSpec
from backends.surroundings import Demanded, Surroundings
from backends.tasks import spawn
from backends.turns import RefusedError
from backends.warm import Warmer
from proxy.config import Config, Serves
from proxy.contract import ReplicaRecord

FIRST_SNAPSHOT_S_MAX = 5.0


class Manager:
    """The replicas of a region and everything that keeps them."""

    def __init__(
        self,
        config: Config,
        *,
        provider: Provider,
        fetch: Fetch,
        journal: Journal,
        log: Log,
        clock: Clock,
        engines: Mapping[str, Engine] = ENGINES,
        cards: Cards | None = None,
        suspender_of: Callable[[Engine], Suspender] = lambda _engine: NoSuspender(),
        snapshots: Snapshots | None = None,
        demand: Demanded | None = None,
        moves: Follows | None = None,
    ) -> None:
        self._engines = engines
        self._log = log
        self._journal = journal
        self._provider = provider
        self._started = False  # until all is adopted nothing follows from what is there
        self._pending = False
        self._closing: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self.serving = False
        self.offline = config.offline
        self.keepers: dict[str, Keeper] = {}
        book = DemandBook(clock.now_s)
        self.feed = Feed(uuid.uuid4().hex, config.region, self._records, clock, book.publish)
        settings = config.manager
        self._cards = cards or Cards(None, log)
        lists = Lists(Path(settings.run_dir) / "reads")
        self._warmer = Warmer(log, enabled=warms(settings), lists=lists)
        self._around = Surroundings(
            clock=clock,
            provider=provider,
            fetch=fetch,
            journal=journal,
            ports=port_leases(settings),
            cards=self._cards,
            warmer=self._warmer,
            log=log,
            log_folder=Path(settings.run_dir) / "logs",
            region=config.region,
            scrape_interval_s=settings.scrape_interval_secs,
            backoff_s=settings.restart_backoff_secs,
            backoff_s_max=settings.restart_backoff_max_secs,
            changed=self._changed,
            suspender_of=suspender_of,
            snapshots=snapshots or NoSnapshots(),
            demand=demand or book,
            moves=moves or Nobody(),
        )
        self.scaler = Autoscaler(self._around, engines, self.keepers, book, self._reconcile)
        self.scaler.want(config)
        path = Path(settings.run_dir) / "reclaim.json"
        self.reclaims = Reclaims(self._around, engines, self.keepers, path, self._changed)

    async def start(self) -> None:
        """Adopt what runs, start what does not, and publish the first snapshot."""
        await self._adopt()
        self._started = True
        self.scaler.begin()
        self.serving = True
        self.feed.mark()
        await self.feed.newer(0, FIRST_SNAPSHOT_S_MAX)

    def reload(self, config: Config) -> None:
        """Want what `config` says from now on."""
        self.scaler.want(config)
        self.scaler.tick()

    async def stop(self) -> None:
        """Stop every replica in order: drain, SIGTERM, SIGKILL; return when all are at rest.

        At rest they have let go of their GPUs, or it has been told what is still held.
        """
        self.serving = False
        self.scaler.close()
        self._reconcile()
        await self._stopped.wait()
        await self._cards.settled()

    async def sweep(self) -> None:
        """Adopt what a manager before left running, start nothing, and stop all of it."""
        await self._adopt()
        self._started = True
        await self.stop()

    def hurry(self) -> None:
        """Stop waiting for anybody."""
        for keeper in list(self.keepers.values()):
            keeper.apply(Event.HURRY, "stopped in a hurry")
        self._cards.hurry()

    async def close(self) -> None:
        """Let go of what still runs."""
        self.scaler.close()
        self.reclaims.close()
        self.feed.close()
        await asyncio.gather(*(keeper.close() for keeper in self.keepers.values()))
        await asyncio.gather(*self._closing)
        await self._cards.close()
        await self._warmer.close()

    def bound_logs(self) -> None:
        for keeper in self.keepers.values():
            if bound(keeper.log_path):
                self._log.tell("log_cut", replica=keeper.spec.replica_id)

    def _records(self) -> Told:
        records: dict[Serves, list[ReplicaRecord]] = {"requests": [], "jobs": []}
        for keeper in self.keepers.values():
            facts = self._engines[keeper.spec.engine].facts(keeper.spec)
            records[facts.serves].append(keeper.record())
        pools = self.scaler.records()
        if self.reclaims.all_goes:  # whoever is held for a pool would wait in vain
            pools = tuple(msgspec.structs.replace(pool, wakes=False) for pool in pools)
        return Told(tuple(records["requests"]), pools, tuple(records["jobs"]))

    def _changed(self) -> None:
        """Something happened to a replica: publish it, and see what follows, once for a burst."""
        if not self._started:
            return
        self.feed.mark()
        if not self._pending:
            self._pending = True
            asyncio.get_running_loop().call_soon(self._reconcile)

    def _reconcile(self) -> None:
        self._pending = False
        all_wanted = self.reclaims.shaped(self.scaler.wanted())
        observed = [keeper.observed for keeper in self.keepers.values()]
        for action in reconcile(all_wanted, observed):
            match action:
                case Create(wanted):
                    keeper = self._keep(wanted)
                    keeper.apply(Event.START)
                case Update(wanted):
                    self.keepers[wanted.spec.replica_id].update(wanted)
                case Remove(replica_id):
                    self._forget(replica_id)
                case _:
                    self._tell(self.keepers[action.replica_id], action)
        if not all_wanted and not self.keepers:
            self._stopped.set()
        else:
            self._stopped.clear()
        self.feed.mark()  # pools are news, too: new ones, and what they ask of other regions

    def _tell(self, keeper: Keeper, action: Start | Restart | Adapt | Lower | Raise | Stop) -> None:
        try:
            match action:
                case Start():
                    keeper.apply(Event.START)
                case Restart():
                    keeper.apply(Event.RESTART, "its command changed")
                case Adapt():
                    keeper.adapt()
                case Lower(rung=rung):
                    keeper.lower(rung, "it is not needed now")
                case Raise():
                    keeper.raise_("it is needed")
                case Stop():
                    keeper.apply(Event.STOP, "no longer wanted")
        except RefusedError as error:
            self._log.tell("refused", replica=action.replica_id, reason=str(error))

    def _keep(self, wanted: Wanted) -> Keeper:
        keeper = Keeper(wanted, self._engines[wanted.spec.engine], self._around)
        self.keepers[wanted.spec.replica_id] = keeper
        return keeper

    def _forget(self, replica_id: str) -> None:
        keeper = self.keepers.pop(replica_id)
        task = spawn(keeper.close(), f"close {replica_id}", self._log)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self.feed.mark()

    async def _adopt(self) -> None:
        """Take over what a manager before left running.

        All of it: what is not wanted any more, or is wanted otherwise, may be answering requests,
        so it goes down the same ordered way as any other replica.
        """
        launches = list(self._journal.live.values())
        processes = self._provider.recover(launches)
        adoptions = []
        for launch in launches:
            process = processes.get(launch.launch_id)
            known = launch.engine in self._engines and launch.replica_id not in self.keepers
            if process is None or not known:
                self._drop(launch, process)
                continue
            wanted = self.scaler.meant(launch.replica_id)
            if wanted is None or wanted.spec.engine != launch.engine:
                wanted = _orphan(launch)  # it is what it was started as until it has ended
            keeper = self._keep(wanted)
            adoptions.append(keeper.adopt(launch, process))
        await asyncio.gather(*adoptions)

    def _drop(self, launch: Launch, process: Process | None) -> None:
        """Close the account of a life that is over, or that nobody here knows how to keep."""
        if process is not None:
            process.signal_group(signal.SIGKILL)
            process.release()
        try:
            self._journal.append(Ended(launch.launch_id, "gone when the manager came up"))
        except OSError as error:
            self._log.fault("journal_failed", error=str(error))


def _orphan(launch: Launch) -> Wanted:
    """Return the specification of a process that the configuration no longer names."""
    spec = ReplicaSpec(
        replica_id=launch.replica_id,
        model=launch.model,
        pool=launch.pool,
        engine=launch.engine,
        stop_grace_s=launch.stop_grace_s,
    )
    return Wanted(spec, launch.launch_hash)
