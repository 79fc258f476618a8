"""The process that keeps jobs: Files and Batches for clients, the desk for workers.

What it knows is in its store and nowhere else, so it may be killed at any moment: what was cut of
an upload is dropped later, a validation begins anew, chunks stay with their workers, who report to
the next process under the same fences. SIGTERM and SIGINT end it in order: no new connections, the
waits of long polls are cut, answers that are under way are finished (the second signal cuts them).
SIGHUP has it read anew which models there are and what they cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import uuid
from pathlib import Path

from aiohttp import web

from backends.clock import Clock, SystemClock
from backends.failure import StartError
from backends.log import Log
from backends.offline.api_errors import ApiError, error_middleware
from backends.offline.batches_api import BatchesApi
from backends.offline.counted_desk import CountedDesk
from backends.offline.dispatch import Dispatcher, GroupReport
from backends.offline.files_api import FilesApi
from backends.offline.fleet_models import KnownModels, configured_names
from backends.offline.metrics import Metrics
from backends.offline.needs_telling import NeedsTeller
from backends.offline.records import (
    ConflictError,
    FullError,
    NotFoundError,
    StoreError,
    UnavailableError,
)
from backends.offline.setting import Setting, locked_out, prices_of
from backends.offline.store import Store
from backends.offline.tenants import Door, Rights
from backends.offline.usage_log import UsageLog
from backends.offline.validating import Validator
from backends.offline.work_api import WorkApi
from backends.providers.process import boot_id
from backends.serve import Orders
from backends.tasks import cancel_all, spawn
from proxy.config import ConfigError, load_config

VALIDATORS = 2  # so that a small file does not wait for a large one
LINE_BYTES_MAX = 32 * 1024 * 1024  # of one line: half of what a worker is sent at once
FINISH_INTERVAL_S = 1.0
PRUNE_INTERVAL_S = 60.0
SHUTDOWN_S = 10.0  # for answers that are under way


def refusal_of(error: Exception) -> ApiError | None:
    """Say how an error of the store is answered; None: it is none."""
    match error:
        case NotFoundError():
            return ApiError(404, str(error), param="id", code="not_found")
        case ConflictError():
            return ApiError(409, str(error), code="conflict")
        case FullError():
            return ApiError(507, str(error), code="storage_full")
        case UnavailableError():
            return ApiError(503, str(error), code="store_unavailable")
        case StoreError():
            return ApiError(500, str(error))
        case _:
            return None


async def serve_offline(setting: Setting) -> int:
    """Run until a signal ends it. Raises `StartError` before it listens."""
    log, orders, offline = Log(), Orders(), setting.config.offline
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(listen(offline.host, offline.port))
        clock = SystemClock()
        store = await open_store(setting, clock)
        stack.push_async_callback(store.close)
        orders.attend()
        service = OfflineService(setting, store, clock, log)
        return await service.run(listener, orders)


async def open_store(setting: Setting, clock: Clock) -> Store:
    """Open what jobs are kept in. Raises `StartError`."""
    try:
        if "://" not in setting.store:
            Path(setting.store).parent.mkdir(parents=True, exist_ok=True)
        return await Store.open(setting.store, limits=setting.limits, clock=clock)
    except (StoreError, OSError) as error:
        place = setting.store.rpartition("@")[2]  # without a password
        problem = (error.strerror if isinstance(error, OSError) else None) or error
        raise StartError(f"the store of jobs, {place}, cannot be used: {problem}") from error


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `StartError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise StartError(
            f"port {port} on {host} cannot be used for the offline service: "
            f"{error.strerror or error}; choose another with --port or offline.port"
        ) from error


class OfflineService:
    """One life of the service over an open store."""

    def __init__(self, setting: Setting, store: Store, clock: Clock, log: Log) -> None:
        self._setting, self._store, self._clock, self._log = setting, store, clock, log
        self._ending = asyncio.Event()
        self._cancelled = asyncio.Event()
        self._models = KnownModels(configured_names(setting.config.models))
        self._rights = Rights(setting.config.tenants)
        self.desk = CountedDesk(store, clock)
        self._prices = prices_of(setting.config.models)
        self._teller = NeedsTeller(
            store, uuid.uuid4().hex, self.desk.abilities, self._has_replicas, clock, log
        )
        offline, door = setting.config.offline, Door.of(setting.config.proxy)
        self._files = FilesApi(store, door, offline.file_bytes_max)
        self._batches = BatchesApi(
            store,
            self.desk,
            clock,
            door=door,
            prices=self._prices,
            ending=self._ending,
            cancelled=self._cancelled,
            moved_up=self._moved_up,
            nobody=self._teller.nobody,
        )
        self._work = WorkApi(self.desk, offline.work_key, self._ending)
        self._usage = UsageLog(
            setting.config.proxy.usage_log,
            setting.config.region,
            setting.config.access.models,
            clock,
            log,
        )
        store.on_taken = self._usage.take
        self._dispatcher = self._make_dispatcher()
        self._metrics = Metrics(store, self.desk, self._files, self._sent)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[error_middleware(self._log, refusal_of)])
        app.add_routes(
            [
                *self._files.routes(),
                *self._batches.routes(),
                *self._work.routes(),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics.answer),
            ]
        )
        return app

    def _moved_up(self, model: str) -> bool:
        return self._dispatcher is not None and self._dispatcher.moved_up(model)

    def _has_replicas(self, model: str) -> bool:
        return self._dispatcher is not None and self._dispatcher.serves(model)

    def _sent(self) -> list[GroupReport]:
        return [] if self._dispatcher is None else self._dispatcher.reports()

    async def _health(self, _request: web.Request) -> web.Response:
        if self._ending.is_set():
            return web.Response(status=503, text="ending\n")
        return web.Response(text="ok\n")

    async def run(self, listener: socket.socket, orders: Orders) -> int:
        """Serve until a signal; return the exit status, which is 1 when one of the chores died."""
        runner = web.AppRunner(
            self.application(),
            access_log=None,
            shutdown_timeout=SHUTDOWN_S,
            auto_decompress=False,  # a body of few octets must not become one of many
        )
        await runner.setup()
        stop = spawn(_wait(orders.stop), "stop", self._log)
        host, port = listener.getsockname()[:2]
        place = _place(port)
        chores = [
            *self._chores(place),
            spawn(self._reload(orders), "reload", self._log),
        ]
        dispatcher = self._dispatcher
        if dispatcher is not None:
            dispatcher.start(place)
        await web.SockSite(runner, listener).start()
        self._log.tell("offline_listening", host=host, port=port, pid=os.getpid())
        try:
            await asyncio.wait({stop, *chores}, return_when=asyncio.FIRST_COMPLETED)
            return 0 if stop.done() else 1
        finally:
            self._log.tell("offline_stopping")
            self._ending.set()
            if dispatcher is not None:
                await dispatcher.close()
            await cancel_all([stop, *chores])
            cleanup = spawn(runner.cleanup(), "clean up", self._log)
            hurry = spawn(_wait(orders.hurry), "hurry", self._log)
            await asyncio.wait({cleanup, hurry}, return_when=asyncio.FIRST_COMPLETED)
            await cancel_all([cleanup, hurry])
            self._log.tell("offline_stopped")

    def _make_dispatcher(self) -> Dispatcher | None:
        """Return who sends lines to replicas that have room, where that is wished for."""
        setting = self._setting
        proxy_url, manager_url = setting.proxy_url, setting.manager_url
        if not setting.config.offline.spare_capacity or proxy_url is None or manager_url is None:
            return None
        if (reason := locked_out(setting.config.offline, setting.config.proxy)) is not None:
            self._log.caution("no_spare_capacity", reason=reason)
            return None
        return Dispatcher(
            self.desk,
            self._teller.needs,
            setting.config,
            proxy_url=proxy_url.rstrip("/"),
            manager_url=manager_url.rstrip("/"),
            api_key=setting.config.proxy.api_key,
            internal_key=setting.config.proxy.internal_key,
            clock=self._clock,
            log=self._log,
        )

    def _chores(self, place: str) -> list[asyncio.Task[None]]:
        """Start what goes on beside the requests; the next life at this `place` claims the same."""
        log, offline = self._log, self._setting.config.offline
        chores = [spawn(self._finish(), "finish", log), spawn(self._prune(), "prune", log)]
        chores.append(spawn(self._usage.run(), "usage", log))
        for number in range(VALIDATORS):
            validator = Validator(
                self._store,
                self._models,
                self._rights,
                log,
                service_id=f"{place}-{number}",
                lines_max=offline.lines_max,
                line_bytes_max=min(LINE_BYTES_MAX, offline.file_bytes_max),
            )
            chores.append(spawn(validator.run(), "validate", log))
        if self._setting.manager_url is not None:
            url = self._setting.manager_url.rstrip("/")
            chores.append(spawn(self._models.follow(url), "models", log))
            chores.append(spawn(self._teller.run(url), "needs", log))
        return chores

    async def _reload(self, orders: Orders) -> None:
        """Take the models of the file anew at each SIGHUP; a faulty file changes nothing."""
        while True:
            await orders.reload.wait()
            orders.reload.clear()
            if self._setting.config_path is None:
                continue
            try:
                config = load_config(self._setting.config_path)
            except ConfigError as error:
                self._log.fault("reload_failed", reason=str(error), kept="the models before")
                continue
            models = config.models
            self._usage.configure(config.access.models)
            self._models.configure(configured_names(models))
            self._rights.configure(config.tenants)
            self.desk.abilities.forget()
            if self._dispatcher is not None:
                self._dispatcher.configure(models)
            self._prices.clear()
            self._prices.update(prices_of(models))
            self._log.tell("reload_done", models=len(models))

    async def _finish(self) -> None:
        """End what is cancelled, overdue or complete; a failure of the store is tried again."""
        troubled = ""  # told once, however long a store is away
        while True:
            self._cancelled.clear()
            try:
                ended, troubled = await self._store.finish_due(), ""
                if ended:
                    self._log.tell("batches_finished", batches=ended)
            except StoreError as error:
                if str(error) != troubled:
                    troubled = str(error)
                    self._log.caution("finishing_failed", reason=troubled)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FINISH_INTERVAL_S):
                    await self._cancelled.wait()

    async def _prune(self) -> None:
        while True:
            try:
                gone = await self._store.prune()
                if gone:
                    self._log.tell("pruned", rows=gone)
            except StoreError as error:
                self._log.caution("pruning_failed", reason=str(error))
            await asyncio.sleep(PRUNE_INTERVAL_S)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _place(port: int) -> str:
    """Name where this service listens: its next life has the same name, and nobody else.

    Machines that were copied from one image may share theirs, so that of this boot counts, too. It
    is short, because ids of workers begin with it and have to end in their models.
    """
    whole = f"{boot_id()}:{socket.gethostname()}:{port}"
    return hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()
