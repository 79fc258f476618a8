"""What clients see of upgrades and reloads of the proxy while they use it: nothing, or it fails.

A proxy runs in front of a tiny engine. Three sorts of clients ask it without pause: some keep their
connections and let them rest now and then, some take a new connection for each request, some read
streams. Meanwhile the proxy is told several times to hand over to a new process of itself (SIGUSR2)
and to read a changed configuration (SIGHUP). Every request ends as one of

* complete   the whole answer came: of a stream as many events as were sent, and its end;
* failed     an error status, no connection, or a connection that was closed before an answer;
* cut        an answer that began and did not come to its end.

Both failed and cut must be 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Self

import msgspec
import orjson

from loadtest.client import Client, RequestError
from loadtest.fleet import local
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.tiny_engine import EVENTS, MODEL, TinyEngine
from loadtest.wire import AnswerReader

SUMMARY = "upgrades and reloads of the proxy under load"
KINDS = ("kept", "fresh", "stream")
POLL_INTERVAL_S = 0.02
PATIENCE_S = 60.0
REST_S_MAX = 0.3
BODY = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}]})
STREAM_BODY = BODY[:-1] + b',"stream":true}'


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything."""

    upgrades: int = 3
    reloads: int = 5
    clients: int = 16  # of each sort
    pause: float = 1.0  # s of load between two events
    workers: tuple[int, ...] = (2, 1, 3)  # in turn, one for each process


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What became of all requests, by sort."""

    complete: dict[str, int]
    failed: dict[str, int]
    cut: dict[str, int]
    details: tuple[str, ...]
    upgrades_s: tuple[float, ...]  # from the signal to the new one's word
    reloads: int
    left: int  # old processes that had ended when the load ended

    @property
    def kept_promises(self) -> bool:
        return not sum(self.failed.values()) and not sum(self.cut.values())


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--upgrades", type=int, default=base.upgrades, help="default %(default)s")
    add("--reloads", type=int, default=base.reloads, help="default %(default)s")
    add("--clients", type=int, default=base.clients, help="of each sort (default %(default)s)")
    add("--pause", type=float, default=base.pause, help="s of load between two events")
    add("--quick", action="store_true", help="one upgrade, one reload, few clients")
    add("--json", metavar="FILE", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    options = Options(
        upgrades=args.upgrades, reloads=args.reloads, clients=args.clients, pause=args.pause
    )
    if args.quick:
        options = Options(upgrades=1, reloads=1, clients=4, pause=0.2)
    finding = asyncio.run(measure(options))
    print(table(finding))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps(msgspec.to_builtins(finding)))
    return 0 if finding.kept_promises else 1


async def measure(options: Options) -> Finding:
    """Run everything. Raises `RunError` when the proxy does not do as it is told."""
    async with TinyEngine() as engine, proxy(engine.url, options) as running:
        load = Load(running.port, options.clients)
        async with load:
            upgrades_s = []
            for event in schedule(options):
                await asyncio.sleep(options.pause)
                if event == "upgrade":
                    upgrades_s.append(await running.upgrade())
                else:
                    await running.reload()
            await asyncio.sleep(options.pause)
        # Streams and kept connections have told the old ones that nothing more will come.
        await running.until(lambda: not any(map(_alive, running.old)), "the old ones to end")
        return Finding(
            complete=dict(load.complete),
            failed=dict(load.failed),
            cut=dict(load.cut),
            details=tuple(f"{count} {what}" for what, count in sorted(load.details.items())),
            upgrades_s=tuple(upgrades_s),
            reloads=options.reloads,
            left=len(running.old),
        )


def schedule(options: Options) -> list[str]:
    """Spread reloads between upgrades; the last event is an upgrade where there is one."""
    total = options.upgrades + options.reloads
    due = [n * options.upgrades // total for n in range(total + 1)]
    return ["upgrade" if due[n + 1] > due[n] else "reload" for n in range(total)]


# --- the clients ----------------------------------------------------------------------------------


class Load:
    """Clients that go on asking until the end of the block."""

    def __init__(self, port: int, clients: int) -> None:
        self.complete: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.details: Counter[str] = Counter()
        self._target = local(port)
        self._clients = clients
        self._clock = WallClock()
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []
        self._random = random.Random(1)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for kind in KINDS:
            self._tasks += [loop.create_task(self._go_on(kind)) for _ in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)

    async def _go_on(self, kind: str) -> None:
        # A kept connection is used again whatever the pause: the proxy alone may end it.
        client = Client(self._target, self._clock.now_s, idle_s_max=PATIENCE_S)
        try:
            while not self._over:
                await self._ask(kind, client)
                if kind == "fresh":
                    client.close()
                rests = kind == "kept" and self._random.random() < 0.2
                await asyncio.sleep(self._random.random() * REST_S_MAX if rests else 0.002)
        finally:
            client.close()

    async def _ask(self, kind: str, client: Client) -> None:
        reader = AnswerReader()
        body = STREAM_BODY if kind == "stream" else BODY
        try:
            async with asyncio.timeout(PATIENCE_S):
                await client.post("/v1/chat/completions", body, reader=reader)
        except (RequestError, TimeoutError) as error:
            what = error.kind if isinstance(error, RequestError) else "no end"
            (self.cut if reader.status == 200 else self.failed)[kind] += 1
            self.details[f"{kind}: {what}"] += 1
            return
        if reader.status != 200:
            self.failed[kind] += 1
            self.details[f"{kind}: status {reader.status}"] += 1
        elif kind == "stream" and not (reader.done_seen and reader.content_events == EVENTS):
            self.cut[kind] += 1
            self.details[f"{kind}: {reader.content_events} events of {EVENTS}"] += 1
        else:
            self.complete[kind] += 1


# --- the proxy ------------------------------------------------------------------------------------


class Proxy:
    """The proxy that serves now, followed by its log."""

    def __init__(self, folder: Path, engine_url: str, workers: Sequence[int]) -> None:
        self.port = 0
        self.pid = 0
        self.old: list[int] = []
        self._engine_url = engine_url
        self._workers = workers
        self._process: asyncio.subprocess.Process | None = None
        self._config = folder / "proxy.yaml"
        self._log = folder / "proxy.log"
        self._changes = 0

    async def start(self) -> None:
        self._write_config()
        flags = ("--config", str(self._config), "--port", "0", "--admin-port", "0")
        with open(self._log, "wb") as log:  # noqa: ASYNC230 - once, before anything is measured
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "proxy", *flags, "--access-log", "off"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid = self._process.pid
        await self._said(rb"listening on http://\S+:(\d+)", 0)
        self.port = int(re.findall(rb"listening on http://\S+:(\d+)", self._text())[0])
        await self._said(rb"serves tiny", 0)

    async def upgrade(self) -> float:
        """Have it hand over; return how long that took."""
        clock = WallClock()
        before = len(self._text())
        self.old.append(self.pid)
        self._write_config()
        os.kill(self.pid, signal.SIGUSR2)
        match = await self._said(rb"\[(\d+)\] took over", before)
        self.pid = int(match[1])
        return clock.now_s()

    async def reload(self) -> None:
        before = len(self._text())
        self._write_config()
        os.kill(self.pid, signal.SIGHUP)
        await self._said(rb"reloaded; changed", before)

    def _write_config(self) -> None:
        """Write another configuration; the number of workers is for the next process."""
        self._changes += 1
        settings = {
            "worker_urls": [self._engine_url],
            "workers": self._workers[len(self.old) % len(self._workers)],
            "policy": ("prefix", "least_load", "round_robin")[self._changes % 3],
            "max_concurrent_requests": 1000 + self._changes,
        }
        fresh = self._config.with_suffix(".new")
        fresh.write_text(json.dumps({"proxy": settings}))
        fresh.rename(self._config)

    def _text(self) -> bytes:
        return self._log.read_bytes()

    async def _said(self, pattern: bytes, after: int) -> re.Match[bytes]:
        found: list[re.Match[bytes]] = []

        def look() -> bool:
            found.extend(re.finditer(pattern, self._text()[after:]))
            return bool(found)

        await self.until(look, pattern.decode())
        return found[0]

    async def until(self, claim: Callable[[], bool], what: str) -> None:
        """Wait until `claim` holds. Raises `RunError` with the end of the log."""
        clock = WallClock()
        while not claim():
            if clock.now_s() > PATIENCE_S:
                end = self._text()[-2000:].decode("utf-8", "replace")
                raise RunError(f"waited {PATIENCE_S:g} s for {what}; the proxy's log ends:\n{end}")
            await asyncio.sleep(POLL_INTERVAL_S)

    async def stop(self) -> None:
        for pid in (self.pid, *self.old):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        try:
            await self.until(lambda: not any(map(_alive, (self.pid, *self.old))), "the end")
        finally:
            for pid in (self.pid, *self.old):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process is not None:
                await self._process.wait()


@contextlib.asynccontextmanager
async def proxy(engine_url: str, options: Options) -> AsyncIterator[Proxy]:
    with tempfile.TemporaryDirectory(prefix="loadtest-upgrade-") as folder:
        running = Proxy(Path(folder), engine_url, options.workers)
        try:
            await running.start()
            yield running
        finally:
            await running.stop()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def table(finding: Finding) -> str:
    """Return the finding as text."""
    rows = [("clients", "requests", "failed", "cut")]
    for kind in KINDS:
        counts = [getattr(finding, name).get(kind, 0) for name in ("complete", "failed", "cut")]
        rows.append((kind, str(sum(counts)), str(counts[1]), str(counts[2])))
    lines = [f"{row[0]:<8}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    took = " ".join(f"{seconds:.2f}" for seconds in finding.upgrades_s)
    lines.append(
        f"{len(finding.upgrades_s)} upgrades (took {took} s), {finding.reloads} reloads; "
        f"{finding.left} old processes have ended"
    )
    return "\n".join([*lines, *finding.details])
