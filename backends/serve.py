"""The manager as a process: one to a run folder, a listener, signals, an ordered end.

The lock on the run folder is taken first, because two managers would stop each other's replicas;
the API's port comes next, so that a port in use is told before anything has been started. The API
answers only once the first snapshot is complete: a proxy that comes back to a new manager must not
see a fleet without the replicas that are being adopted.

SIGTERM and SIGINT stop every replica in order and exit 0, and the second one hurries. With
`detach_on_exit` the replicas run on for the next manager; a `sweep` is a manager that only stops
what one before it left. SIGHUP reads the models again; the
manager's own section, the region and the address of the desk stay as they were until it is started
anew, which costs nothing with `detach_on_exit`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from aiohttp import web

from backends.api import Api
from backends.cards import Cards
from backends.clock import SystemClock
from backends.engines import ENGINES
from backends.engines.base import Engine
from backends.failure import StartError
from backends.fetch import HttpFetch
from backends.gpus import GpuLeases, described
from backends.inventory import card_use, find_gpus
from backends.journal import Journal
from backends.keys.source import Keys, told_keys
from backends.log import Log
from backends.manager import Manager
from backends.notice_watch import watch_notice
from backends.providers.choice import cluster_cards, open_provider
from backends.snapshots.choice import look_ahead, open_snapshots, suspenders
from backends.tasks import cancel_all, spawn
from backends.tracing import open_moves
from proxy import systemd
from proxy.config import Config, ConfigError, OfflineConfig, load_config

LOG_CHECK_INTERVAL_S = 30.0
ALIVE_INTERVAL_S = 1.0
FAREWELL_S = 0.1  # time for the last snapshot to reach the proxies


def lock_run_folder(run_folder: Path) -> int:
    """Return the descriptor of the lock. Raises `StartError` when another manager has it."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(run_folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StartError(f"run folder {run_folder} cannot be used: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(fd, 32).decode("ascii", "replace").strip()
        os.close(fd)
        raise StartError(
            f"a manager (pid {owner or 'unknown'}) already runs on {run_folder}; "
            f"stop it (kill {owner or 'PID'}) or choose another --run-dir"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `StartError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise StartError(
            f"port {port} on {host} cannot be used for the manager's API: "
            f"{error.strerror or error}; choose another with --port"
        ) from error


class Orders:
    """What the signals asked for."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.reload = asyncio.Event()

    def end(self) -> None:
        """The first asks for an ordered end, the second for a quick one."""
        (self.hurry if self.stop.is_set() else self.stop).set()

    def attend(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.end)
        loop.add_signal_handler(signal.SIGINT, self.end)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)


async def serve(
    config: Config,
    config_path: str | None,
    *,
    detach_on_exit: bool = False,
    sweep: bool = False,
    engines: Mapping[str, Engine] = ENGINES,
) -> int:
    """Run until a signal ends it. Raises `StartError` before anything has been started."""
    if not hasattr(os, "pidfd_open"):
        raise StartError("the manager needs Linux: it watches its processes by pidfd and /proc")
    log, orders, settings = Log(), Orders(), config.manager
    run_folder = Path(settings.run_dir)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(os.close, lock_run_folder(run_folder))
        listener = None
        if not sweep:
            listener = stack.enter_context(listen(settings.host, settings.port))
        keys = None if sweep else stack.enter_context(told_keys(config, log))
        journal = open_journal(run_folder, log)
        stack.callback(journal.close)
        fetch = HttpFetch()
        stack.push_async_callback(fetch.close)
        provider = await stack.enter_async_context(open_provider(config, journal, log))
        cards = cluster_cards(provider, settings, log) or await open_cards(settings.cards, log)
        snapshots = open_snapshots(config, log)
        ahead = functools.partial(look_ahead, engines=engines, snapshots=snapshots)
        await asyncio.to_thread(ahead, config)
        manager = Manager(
            config,
            provider=provider,
            fetch=fetch,
            journal=journal,
            log=log,
            clock=SystemClock(),
            engines=engines,
            cards=cards,
            suspender_of=suspenders(config),
            snapshots=snapshots,
            moves=stack.enter_context(open_moves(config, os.environ, log)),
        )
        stack.push_async_callback(manager.close)
        if listener is None or keys is None:
            await _sweep(manager, orders, log)
            return 0
        if (place := settings.reclaim_notice) is not None:
            task = spawn(watch_notice(place, manager.reclaims, SystemClock(), log), "notices", log)
            stack.push_async_callback(cancel_all, [task])
        await _run(
            manager, keys, listener, orders, config_path, ahead, detach=detach_on_exit, log=log
        )
    return 0


async def open_cards(setting: str, log: Log) -> Cards:
    """Return the GPUs that may be leased. Raises `StartError` when one is named that is not there.

    nvidia-smi takes seconds where the driver is not loaded yet; nothing has been started so far.
    """
    found = await asyncio.to_thread(find_gpus, setting, os.environ)
    if found.inventory is None:
        log.tell("gpus_not_leased", reason=found.note)
        return Cards(None, log)
    cards = found.inventory.gpus
    log.tell("gpus_found", gpus=[described(card) for card in cards], note=found.note)
    return Cards(GpuLeases(found.inventory), log, card_use if found.seen else None)


def open_journal(run_folder: Path, log: Log) -> Journal:
    """Return the run folder's journal. Raises `StartError`."""
    try:
        (run_folder / "logs").mkdir(exist_ok=True)
        journal = Journal(run_folder / "journal")
    except OSError as error:
        raise StartError(f"run folder {run_folder} cannot be used: {error}") from error
    if journal.damaged_lines:
        log.caution("journal_damaged", lines=journal.damaged_lines)
    return journal


async def _run(
    manager: Manager,
    keys: Keys,
    listener: socket.socket,
    orders: Orders,
    config_path: str | None,
    ahead: Callable[[Config], None],
    *,
    detach: bool,
    log: Log,
) -> None:
    orders.attend()
    await manager.start()
    api = Api(manager, keys.feed, keys.peer_key)
    runner = web.AppRunner(api.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    host, port = listener.getsockname()[:2]
    log.tell("manager_listening", host=host, port=port, pid=os.getpid())
    systemd.serving(f"manager of {len(manager.keepers)} replicas at http://{host}:{port}")
    if not ipaddress.ip_address(host).is_loopback:
        log.caution("manager_exposed", host=host, advice="its API has no key; keep it private")
    chores = [
        spawn(_reload_on_order(manager, orders, config_path, ahead, log), "reload", log),
        spawn(_bound_logs(manager), "bound logs", log),
        spawn(_say_alive(), "say alive", log),
        *(spawn(work, "keys", log) for work in keys.chores()),
    ]
    try:
        await orders.stop.wait()
        systemd.stopping("leaving the replicas running" if detach else "stopping the replicas")
        log.tell("manager_stopping", detach=detach)
        if not detach:
            chores.append(spawn(_hurry_on_order(manager, orders), "hurry", log))
            await manager.stop()
            await asyncio.sleep(FAREWELL_S)
    finally:
        await cancel_all(chores)
        api.end_watches()
        await runner.cleanup()
        log.tell("manager_stopped", detach=detach)


async def _sweep(manager: Manager, orders: Orders, log: Log) -> None:
    """Stop what runs; a signal hurries."""
    orders.stop.set()
    orders.attend()
    hurry = spawn(_hurry_on_order(manager, orders), "hurry", log)
    try:
        await manager.sweep()
    finally:
        await cancel_all([hurry])
    log.tell("manager_swept")


async def _hurry_on_order(manager: Manager, orders: Orders) -> None:
    await orders.hurry.wait()
    manager.hurry()


async def _reload_on_order(
    manager: Manager,
    orders: Orders,
    config_path: str | None,
    ahead: Callable[[Config], None],
    log: Log,
) -> None:
    """Take the file anew at each SIGHUP; a faulty file changes nothing.

    What its pools may want is asked `ahead` whether it works: the loop serves others meanwhile.
    """
    while True:
        await orders.reload.wait()
        orders.reload.clear()
        if config_path is None:
            log.caution("reload_skipped", reason="there is no configuration file")
            continue
        try:
            config = _reloaded(load_config(config_path), manager.offline)
        except ConfigError as error:
            log.fault("reload_failed", reason=str(error), kept="the configuration before")
            continue
        await asyncio.to_thread(ahead, config)
        manager.reload(config)
        log.tell("reload_done", replicas=len(manager.keepers))


def _reloaded(config: Config, offline: OfflineConfig) -> Config:
    """Return what is read anew; where the desk is stays as it was, or every worker would start."""
    offline = msgspec.structs.replace(
        offline,
        price_per_hour_max=config.offline.price_per_hour_max,
        spare_capacity=config.offline.spare_capacity,
    )
    return msgspec.structs.replace(config, offline=offline)


async def _say_alive() -> None:
    while True:
        systemd.alive()
        await asyncio.sleep(ALIVE_INTERVAL_S)


async def _bound_logs(manager: Manager) -> None:
    while True:
        await asyncio.sleep(LOG_CHECK_INTERVAL_S)
        manager.bound_logs()
