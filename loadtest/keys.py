"""How soon a change of the API keys is in force everywhere: every worker, proxy and region.

One region has the file of keys: a manager that serves it and two proxies that follow this manager.
Another region's manager follows the first one's, and a proxy follows that. Clients keep connections
to all workers of all proxies open and ask over each without pause, first with a key that there is
not yet. Then `doherty keys` makes keys and revokes them, again and again. Of each change that is
measured, from the moment in which the file was replaced:

* created    until a request with the new key was accepted over every connection;
* revoked    until no request with it was accepted any more over any connection.

A key that is accepted again after it was refused for good, or a request that fails otherwise, is a
broken promise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import orjson

from loadtest.client import Connection, RequestError
from loadtest.run import RunError
from loadtest.wire import AnswerReader

SUMMARY = "how soon created and revoked API keys are in force everywhere"
PATIENCE_S = 120.0
POLL_S = 0.02
LINGER_S = 0.5  # in which a key that was refused could be accepted again
TENANT = "t"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything."""

    changes: int = 10
    proxies: int = 2  # in the region that has the keys
    followers: int = 1  # proxies in the region that follows
    workers: int = 2
    connections: int = 12  # to each proxy
    pause: float = 0.004  # s between two requests over one connection


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds by region, one for each change; and what should not have been."""

    created_s: dict[str, list[float]]
    revoked_s: dict[str, list[float]]
    broken: dict[str, int]
    requests: int

    @property
    def kept_promises(self) -> bool:
        return not any(self.broken.values())


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--changes", type=int, default=base.changes, help="default %(default)s")
    add("--proxies", type=int, default=base.proxies, help="of the first region")
    add("--followers", type=int, default=base.followers, help="proxies of the one that follows")
    add("--workers", type=int, default=base.workers, help="of each proxy (default %(default)s)")
    add("--quick", action="store_true", help="one change, few requests")
    add("--json", metavar="FILE", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    options = Options(
        changes=args.changes, proxies=args.proxies, followers=args.followers, workers=args.workers
    )
    if args.quick:
        options = Options(changes=1, proxies=1, pause=0.05)
    finding = asyncio.run(measure(options))
    print(table(finding, options))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps(msgspec.to_builtins(finding)))
    return 0 if finding.kept_promises else 1


async def measure(options: Options) -> Finding:
    """Run everything. Raises `RunError` when a process does not come up."""
    with tempfile.TemporaryDirectory(prefix="loadtest-keys-") as folder:
        async with Stage(Path(folder), options) as stage:
            return await _changes(stage, options)


async def _changes(stage: Stage, options: Options) -> Finding:
    created: dict[str, list[float]] = {}
    revoked: dict[str, list[float]] = {}
    broken = {"accepted again": 0, "other status": 0, "no answer": 0}
    requests = 0
    for _ in range(options.changes):
        key_id, key = await stage.create()
        async with Asking(stage.ports, key, options) as asking:
            made_s = stage.changed_s()
            await asking.until_all(accepted=True)
            for region, at_s in asking.changed_s().items():
                created.setdefault(region, []).append(at_s - made_s)
            await stage.keys("revoke", key_id)
            ended_s = stage.changed_s()
            await asking.until_all(accepted=False)
            for region, at_s in asking.changed_s().items():
                revoked.setdefault(region, []).append(at_s - ended_s)
            await asyncio.sleep(LINGER_S)
        requests += asking.requests
        broken["accepted again"] += asking.accepted_again
        broken["other status"] += asking.other
        broken["no answer"] += asking.failed
    return Finding(created_s=created, revoked_s=revoked, broken=broken, requests=requests)


# --- the clients ----------------------------------------------------------------------------------


class Line:
    """One kept connection, and what was last answered over it."""

    def __init__(self, region: str) -> None:
        self.region = region
        self.accepted: bool | None = None
        self.changed_s = 0.0  # when the first request so answered was sent
        self.accepted_sent_s = 0.0  # when the last one that was accepted was sent


class Asking:
    """Clients that go on asking with one key until the end of the block."""

    def __init__(self, ports: Mapping[int, str], key: str, options: Options) -> None:
        """`ports` are those of the proxies, each with its region."""
        self._pause_s = options.pause
        self.requests = self.accepted_again = self.other = self.failed = 0
        self._lines = [
            (port, Line(region))
            for port, region in ports.items()
            for _ in range(options.connections)
        ]
        self._head = (
            f"GET /v1/models HTTP/1.1\r\nhost: doherty\r\nauthorization: Bearer {key}\r\n\r\n"
        ).encode()
        self._over = False
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Asking:  # noqa: PYI034 - as it is used
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._go_on(*line)) for line in self._lines]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)

    def changed_s(self) -> dict[str, float]:
        """Return by region when the last connection came to what all are at now, in Unix time."""
        at_s: dict[str, float] = {}
        for _, line in self._lines:
            last_s = line.changed_s if line.accepted else line.accepted_sent_s
            at_s[line.region] = max(at_s.get(line.region, 0.0), last_s)
        return at_s

    async def until_all(self, *, accepted: bool) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while any(line.accepted is not accepted for _, line in self._lines):
                self._changed.clear()
                await self._changed.wait()

    async def _go_on(self, port: int, line: Line) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(time.time), "127.0.0.1", port
        )
        try:
            while not self._over:
                await self._ask(connection, line)
                await asyncio.sleep(self._pause_s)
        except (RequestError, TimeoutError):
            self.failed += 1
        finally:
            connection.abort()

    async def _ask(self, connection: Connection, line: Line) -> None:
        reader, sent_s = AnswerReader(), time.time()
        async with asyncio.timeout(PATIENCE_S):
            await connection.exchange(self._head, b"", reader)
        self.requests += 1
        self.other += reader.status not in (200, 401)
        accepted = reader.status == 200
        if accepted:
            self.accepted_again += line.accepted is False and line.accepted_sent_s > 0
            line.accepted_sent_s = sent_s
        if accepted is not line.accepted:
            line.accepted, line.changed_s = accepted, sent_s
            self._changed.set()


# --- the regions ----------------------------------------------------------------------------------


class Stage:
    """Two regions of managers and proxies without replicas, and the file of keys."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.ports: dict[int, str] = {}
        self._folder = folder
        self._options = options
        self._file = folder / "keys.json"
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Stage:  # noqa: PYI034 - as it is used
        try:
            await self.keys("create", "--tenant", TENANT)
            first = await self._region("here", self._options.proxies, keys_path=str(self._file))
            url = f"http://127.0.0.1:{first}"
            await self._region("there", self._options.followers, keys_follow=url)
            await asyncio.gather(*(self._answers(port) for port in self.ports))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    def changed_s(self) -> float:
        """Return when the file was last replaced, in Unix time."""
        return os.stat(self._file).st_ctime

    async def create(self) -> tuple[str, str]:
        made = json.loads(await self.keys("create", "--tenant", TENANT, "--json"))
        return made["key_id"], made["key"]

    async def keys(self, *arguments: str) -> bytes:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "backends.cli", "keys", *arguments),
            *("--keys", str(self._file)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, words = await process.communicate()
        if process.returncode:
            raise RunError(f"doherty keys {arguments[0]}: {words.decode().strip()}")
        return output

    async def _region(self, region: str, proxies: int, **manager: str) -> int:
        """Start a region; return its manager's port."""
        manager_port, *ports = _free_ports(1 + 2 * proxies)
        config = {
            "region": region,
            "manager": {
                "port": manager_port,
                "run_dir": str(self._folder / region),
                "gpus": "none",
                **manager,
            },
            "tenants": [{"name": TENANT}],
        }
        path = self._folder / f"{region}.json"
        path.write_text(json.dumps(config))
        await self._start(f"{region}-manager", "backends.cli", "manager", "--config", str(path))
        for number in range(proxies):
            port, admin_port = ports[2 * number : 2 * number + 2]
            self.ports[port] = region
            await self._start(
                *(f"{region}-proxy-{number}", "proxy", "--config", str(path)),
                *("--manager-url", f"http://127.0.0.1:{manager_port}", "--access-log", "off"),
                *("--port", str(port), "--admin-port", str(admin_port)),
                *("--workers", str(self._options.workers)),
            )
        return manager_port

    async def _start(self, name: str, module: str, *arguments: str) -> None:
        with open(self._folder / f"{name}.log", "wb") as log:  # noqa: ASYNC230 - not measured
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)

    async def _answers(self, port: int) -> None:
        """Wait until a proxy lets nobody in because it knows whom it would."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + PATIENCE_S
        while True:
            reader = AnswerReader()
            with contextlib.suppress(OSError, RequestError):
                _, connection = await loop.create_connection(
                    lambda: Connection(time.time), "127.0.0.1", port
                )
                head = b"GET /v1/models HTTP/1.1\r\nhost: d\r\nauthorization: Bearer none\r\n\r\n"
                await connection.exchange(head, b"", reader)
                connection.abort()
            if reader.status == 401:
                return
            if loop.time() > give_up_s:
                raise RunError(f"a proxy did not come up; logs:\n{self._logs()}")
            await asyncio.sleep(POLL_S)

    def _logs(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text()[-1000:]}" for path in self._folder.glob("*.log")
        )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]


def table(finding: Finding, options: Options) -> str:
    """Return the finding as text."""
    lines = [f"{'change':<10}{'region':<10}{'n':>4}{'median ms':>12}{'max ms':>12}"]
    for change, by_region in (("created", finding.created_s), ("revoked", finding.revoked_s)):
        for region, taken_s in by_region.items():
            middle_s, most_s = sorted(taken_s)[len(taken_s) // 2], max(taken_s)
            lines.append(
                f"{change:<10}{region:<10}{len(taken_s):>4}"
                f"{middle_s * 1000:>12.0f}{most_s * 1000:>12.0f}"
            )
    proxies = options.proxies + options.followers
    lines.append(
        f"{finding.requests} requests over {options.connections} connections to each of "
        f"{proxies} proxies of {options.workers} workers"
    )
    return "\n".join([*lines, *(f"{count} {what}" for what, count in finding.broken.items())])
