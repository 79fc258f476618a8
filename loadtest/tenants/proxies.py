"""One limit over two proxies: how far what both let in goes beyond it.

Within a proxy all workers count together, and a limit is never exceeded. Proxies tell each other
ten times a second, so both together may let in what comes within one telling after the limit is
reached. Here two whole Dohertys run, their proxies linked as peers. For each rate there is a tenant
with a limit on requests a minute, of five seconds at that rate; requests begin evenly at the rate,
in turn at both proxies, for twice as long. Told is how many were let in beyond the limit, and in
how many milliseconds so many come.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson
import uvloop

from loadtest.client import Client, RequestError
from loadtest.fleet import MODEL, Ports, launched, local
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.tenants.stage import DOHERTY, Setting, fleet_options, key_of, write_keys
from loadtest.wire import AnswerReader

SUMMARY = "a limit of a tenant over two proxies: what both together let in beyond it"
SECONDS = 5.0  # that a limit lasts
LINKED_S = 2.0  # after both serve


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The rates, and how often each is tried."""

    rates: tuple[int, ...] = (20, 50, 100)
    times: int = 3
    workers: int = 2
    doherty: str = DOHERTY


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one rate, each time."""

    rate: int
    limit: int
    let_in: list[int]
    other: dict[str, int]  # answers that are neither whole nor 429

    @property
    def beyond_ms(self) -> list[float]:
        """In how many milliseconds so many come as were let in beyond the limit."""
        return [1000.0 * (count - self.limit) / self.rate for count in self.let_in]


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--rates", type=_numbers, default=base.rates, help="requests a second (20,50,100)")
    add("--times", type=int, default=base.times, help="for each rate (default %(default)s)")
    add("--workers", type=int, default=base.workers, help="of each proxy (default %(default)s)")
    add("--doherty", default=base.doherty, metavar="COMMAND", help="default: of this checkout")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Run all rates. Raises `RunError`."""
    options = Options(**{name: getattr(args, name) for name in Options.__struct_fields__})
    findings = uvloop.run(run_all(options, lambda text: print(text, file=sys.stderr)))
    print(table(options, findings))
    return 1 if any(finding.other for finding in findings) else 0


async def run_all(options: Options, say: Callable[[str], None]) -> list[Finding]:
    """Return a finding for each rate. Raises `RunError`."""
    setting = Setting(workers=options.workers, replicas=1, doherty=options.doherty)
    sockets: list[str] = []

    def configure(ports: Ports, folder: str) -> dict[str, Any]:
        sockets.append(f"unix:{Path(folder).parent / 'peer.sock'}")
        return configuration(setting, options, sockets, ports, folder)

    findings = []
    async with contextlib.AsyncExitStack() as stack:
        ports = []
        for _ in range(2):
            running = await stack.enter_async_context(launched(configure, fleet_options(setting)))
            ports.append(running.ports.proxy)
        await asyncio.sleep(LINKED_S)
        for rate in options.rates:
            say(f"{rate} requests a second")
            let_in, other = [], Counter[str]()
            for time in range(options.times):
                statuses = await offer(ports, f"rate-{rate}-{time}", rate)
                let_in.append(statuses.pop("200", 0))
                statuses.pop("429", 0)
                other += statuses
            limit = int(SECONDS * rate)
            findings.append(Finding(rate=rate, limit=limit, let_in=let_in, other=dict(other)))
    return findings


def configuration(
    setting: Setting, options: Options, sockets: Sequence[str], ports: Ports, folder: str
) -> dict[str, Any]:
    """Return the configuration of a proxy that listens at the last socket and dials the others."""
    tenants = [
        {"name": f"rate-{rate}-{time}", "requests_per_min": int(SECONDS * rate)}
        for rate in options.rates
        for time in range(options.times)
    ]
    keys = Path(folder).parent / "keys.json"
    write_keys(keys, tuple(str(tenant["name"]) for tenant in tenants))
    pool = {"engine": "simulator", "replicas": 1, "args": ["--profile", setting.profile]}
    return {
        "proxy": {
            "port": ports.proxy,
            "admin_port": ports.admin,
            "workers": setting.workers,
            "access_log": "off",
            "keys_path": str(keys),
            "peer_listen": sockets[-1],
            "peers": list(sockets[:-1]),
        },
        "manager": {"port": ports.manager, "run_dir": folder},
        "models": [{"name": MODEL, "pools": [pool]}],
        "tenants": tenants,
    }


async def offer(ports: Sequence[int], tenant: str, rate: int) -> Counter[str]:
    """Begin requests evenly, in turn at each port; return how many had which answer."""
    clock, statuses = WallClock(), Counter[str]()
    body = orjson.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    )

    async def one(client: Client) -> None:
        try:
            reader = await client.post("/v1/chat/completions", body, "", AnswerReader())
            statuses[str(reader.status)] += 1
        except RequestError as error:
            statuses[error.kind] += 1

    with contextlib.ExitStack() as stack:
        clients = []
        for port in ports:
            client = Client(local(port), clock.now_s, api_key=key_of(tenant), explain=False)
            clients.append(stack.enter_context(contextlib.closing(client)))
        begun_s = clock.now_s()
        async with asyncio.TaskGroup() as group:
            for number in range(int(2 * SECONDS * rate)):
                await asyncio.sleep(max(0.0, begun_s + number / rate - clock.now_s()))
                group.create_task(one(clients[number % len(clients)]))
    if not statuses["200"]:
        raise RunError(f"nothing was let in: {dict(statuses)}")
    return statuses


def table(options: Options, findings: Sequence[Finding]) -> str:
    """Return the findings for people."""
    lines = [
        f"two proxies of {options.workers} workers, {options.times} times each",
        f"{'rate /s':>8}{'limit':>8}  let in beyond it, and what comes in so many ms",
    ]
    for f in findings:
        pairs = zip(f.let_in, f.beyond_ms, strict=True)
        beyond = ", ".join(f"{count - f.limit} ({ms:.0f} ms)" for count, ms in pairs)
        other = f"  other answers: {f.other}" if f.other else ""
        lines.append(f"{f.rate:>8}{f.limit:>8}  {beyond}{other}")
    return "\n".join(lines)
