"""Limits of tenants over several workers: how near what is let in comes to them, and never over.

A whole Doherty runs with simulated replicas and some workers, and one tenant for each limit:

* tokens       for a minute requests begin evenly at the limit's own pace; from then on `--clients`
               of them come again as soon as they are answered, or a second after a refusal
               at the latest. Tokens count when their request comes. Told is what every sliding
               minute had of the limit: the most, and the least of those after the first;
* burst        the same without the even minute: what the whole time had, since a minute that begins
               between two bursts misses most of one;
* requests     twice as many at once as a minute may have: how many were let in;
* concurrent   many at once, again and again: how many answers were under way at a time;
* budget       requests until the day's budget is spent: what the answers of those let in cost.

Nothing here reads what the proxy counts: tokens are those that the answers report. When a request
came its access log says, since a client on a busy machine knows it only to some tenths of a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson
import uvloop

from loadtest.client import Client, RequestError
from loadtest.fleet import MODEL, Ports, launched, local
from loadtest.prompts import WORD_BYTES
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.tenants.stage import DOHERTY, Setting, fleet_options, key_of, write_keys
from loadtest.wire import AnswerReader

SUMMARY = "limits of tenants over several workers, against real processes"
PATH = "/v1/chat/completions"
ACCESS_LOG = "access.jsonl"
LOG_LAG_S = 1.0  # a line is written a moment after its answer
MINUTE_S = 60.0
STEP_S = 0.25  # between the beginnings of two sliding minutes that are looked at
RETRY_S_MAX = 1.0
PRICE = 10.0  # of a million tokens, of any kind


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The load, and the limits."""

    clients: int = 200
    workers: int = 4
    tokens_per_min: int = 120_000
    requests_per_min: int = 300
    concurrent: int = 16
    budget: float = 0.5
    prompt_words: int = 60
    output_tokens: int = 40
    minutes: int = 2  # under saturation
    doherty: str = DOHERTY


class Used(msgspec.Struct, frozen=True):
    """One answer: its request, when its first and last word came, and what it reports."""

    request_id: str
    first_s: float
    last_s: float
    tokens: int


class Answers(msgspec.Struct):
    """What came of many requests."""

    used: list[Used] = msgspec.field(default_factory=list)
    refused: Counter[str] = msgspec.field(default_factory=Counter)
    running: int = 0
    tokens: int = 0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one limit was, and what was let in."""

    name: str
    limit: float
    most: float
    least: float  # of what should have been all of it
    mean: float
    answers: int
    refused: dict[str, int]

    @property
    def holds(self) -> bool:
        """Tokens hold within 1 %, since a prompt's are only believed when it is let in."""
        most = 1.01 if self.name in ("tokens", "burst") else 1.0
        return 0.99 * self.limit <= self.least and self.most <= most * self.limit


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--clients", type=int, default=base.clients, help="at a time (default %(default)s)")
    add("--workers", type=int, default=base.workers, help="of the proxy (default %(default)s)")
    add("--tokens-per-min", type=int, default=base.tokens_per_min, help="default %(default)s")
    add("--requests-per-min", type=int, default=base.requests_per_min, help="default %(default)s")
    add("--concurrent", type=int, default=base.concurrent, help="default %(default)s")
    add("--budget", type=float, default=base.budget, help="of the day (default %(default)s)")
    add("--prompt-words", type=int, default=base.prompt_words, help="default %(default)s")
    add("--output-tokens", type=int, default=base.output_tokens, help="default %(default)s")
    add("--minutes", type=int, default=base.minutes, help="of saturation (default %(default)s)")
    add("--doherty", default=base.doherty, metavar="COMMAND", help="default: of this checkout")
    add("--json", metavar="FILE", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Run all of them. Raises `RunError`."""
    options = Options(**{name: getattr(args, name) for name in Options.__struct_fields__})
    findings = uvloop.run(run_all(options, lambda text: print(text, file=sys.stderr)))
    print(table(options, findings))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps([msgspec.to_builtins(f) for f in findings]))
    return 0 if all(finding.holds for finding in findings) else 1


async def run_all(options: Options, say: Callable[[str], None]) -> list[Finding]:
    """Return a finding for each limit. Raises `RunError`."""
    setting = Setting(workers=options.workers, replicas=1, doherty=options.doherty)

    def configure(ports: Ports, folder: str) -> dict[str, Any]:
        return configuration(setting, options, ports, folder)

    findings = []
    async with launched(configure, fleet_options(setting)) as running:
        stage = Stage(running.ports.proxy, options, running.folder / ACCESS_LOG)
        for name, measured in (
            ("requests", stage.requests),
            ("concurrent", stage.concurrent),
            ("budget", stage.budget),
            ("tokens", lambda: stage.tokens("tokens", even=True)),
            ("burst", lambda: stage.tokens("burst", even=False)),
        ):
            say(name)
            findings.append(await measured())
    return findings


def configuration(setting: Setting, options: Options, ports: Ports, folder: str) -> dict[str, Any]:
    """Return the configuration of the run: a tenant for each limit, with a key of its name."""
    tenants: list[dict[str, Any]] = [
        {"name": "tokens", "tokens_per_min": options.tokens_per_min},
        {"name": "burst", "tokens_per_min": options.tokens_per_min},
        {"name": "requests", "requests_per_min": options.requests_per_min},
        {"name": "concurrent", "max_concurrent": options.concurrent},
        {"name": "budget", "budget_per_day": options.budget},
    ]
    keys = Path(folder).parent / "keys.json"
    write_keys(keys, tuple(str(tenant["name"]) for tenant in tenants))
    args = ["--profile", setting.profile, "--stream-interval", "20"]
    prices = dict.fromkeys(("prompt_price", "cached_price", "completion_price"), PRICE)
    pool = {"engine": "simulator", "replicas": setting.replicas, "args": args}
    return {
        "proxy": {
            "port": ports.proxy,
            "admin_port": ports.admin,
            "workers": setting.workers,
            "access_log": str(Path(folder).parent / ACCESS_LOG),
            "keys_path": str(keys),
            "usage_log": str(Path(folder).parent / "usage.jsonl"),
            "quota_path": str(Path(folder).parent / "day.json"),
        },
        "manager": {"port": ports.manager, "run_dir": folder},
        "models": [{"name": MODEL, "pools": [pool], **prices}],
        "tenants": tenants,
    }


class Stage:
    """A running Doherty, and those who ask it."""

    def __init__(self, port: int, options: Options, log: Path) -> None:
        """`log` is the proxy's of accesses."""
        self._port = port
        self._options = options
        self._clock = WallClock()
        self._draw = random.Random(8)
        self._log = log
        self._count = 0

    async def _ask(self, client: Client, answers: Answers, output_tokens: int = 0) -> float:
        """Ask once; return how long to wait after a refusal, 0 after an answer."""
        words = b" ".join(self._draw.choices(WORD_BYTES, k=self._options.prompt_words)).decode()
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": output_tokens or self._options.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._count += 1
        name = f"limits-{self._count}"
        answers.running += 1
        try:
            field = f"x-request-id: {name}\r\n"
            reader = await client.post(PATH, orjson.dumps(body), field, AnswerReader())
        except RequestError as error:
            answers.refused[error.kind] += 1
            return RETRY_S_MAX
        finally:
            answers.running -= 1
        if reader.status == 200 and reader.usage is not None:
            tokens = reader.usage["total_tokens"]
            answers.tokens += tokens
            first_s, last_s = reader.first_content_s, reader.last_content_s
            answers.used.append(Used(name, first_s, last_s, tokens))
            return 0.0
        answers.refused[_code(reader)] += 1
        return min(RETRY_S_MAX, int(reader.headers.get("retry-after-ms", "500")) / 1000.0)

    def _client(self, tenant: str) -> Client:
        return Client(local(self._port), self._clock.now_s, api_key=key_of(tenant), explain=False)

    async def _crowd(
        self, tenant: str, count: int, seconds: float, answers: Answers, output_tokens: int = 0
    ) -> None:
        """So many clients ask again and again."""
        end_s = self._clock.now_s() + seconds

        async def one(client: Client) -> None:
            await asyncio.sleep(self._draw.random() * min(RETRY_S_MAX, seconds / 4))
            while (left_s := end_s - self._clock.now_s()) > 0.0:
                wait_s = await self._ask(client, answers, output_tokens)
                await asyncio.sleep(min(left_s, wait_s * self._draw.uniform(0.5, 1.0)))

        with contextlib.closing(self._client(tenant)) as client:
            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(one(client))

    async def _evenly(self, tenant: str, answers: Answers) -> None:
        """Ask for a minute at the limit's own pace."""
        options = self._options
        begun_s = self._clock.now_s()
        with contextlib.closing(self._client(tenant)) as client:
            async with asyncio.TaskGroup() as group:
                while (gone_s := self._clock.now_s() - begun_s) < MINUTE_S:
                    each = answers.tokens / len(answers.used) if answers.used else 200.0
                    due = options.tokens_per_min * gone_s / MINUTE_S
                    if answers.tokens + (answers.running + 1) * each <= due:
                        group.create_task(self._ask(client, answers))
                    await asyncio.sleep(0.002)

    async def tokens(self, tenant: str, *, even: bool) -> Finding:
        """The tokens of sliding minutes."""
        options, answers = self._options, Answers()
        begun_s = time.time()
        if even:
            await self._evenly(tenant, answers)
        seconds = MINUTE_S * (options.minutes + (0 if even else 1))
        await self._crowd(tenant, options.clients, seconds, answers)
        end_s = time.time()
        await asyncio.sleep(LOG_LAG_S)
        moments = came(self._log)
        used = [(moments[each.request_id], each.tokens) for each in answers.used]
        minutes = sliding(used, begun_s, end_s)
        if even:
            busy = minutes[math.ceil(MINUTE_S / STEP_S) :] or [0]
            least, mean = float(min(busy)), sum(busy) / len(busy)
        else:  # of the whole time, for each minute of it
            least = mean = answers.tokens / math.ceil((end_s - begun_s) / 60.3)
        return Finding(
            name=tenant,
            limit=options.tokens_per_min,
            most=max(minutes, default=0),
            least=least,
            mean=mean,
            answers=len(answers.used),
            refused=dict(answers.refused),
        )

    async def requests(self) -> Finding:
        """Twice as many at once as a minute may have."""
        limit, answers = self._options.requests_per_min, Answers()
        with contextlib.closing(self._client("requests")) as client:
            for _ in range(8):
                async with asyncio.TaskGroup() as group:
                    for _ in range(limit // 4):
                        group.create_task(self._ask(client, answers))
        return _counted("requests", limit, len(answers.used), answers)

    async def concurrent(self) -> Finding:
        """Many at once: answers that were under way at the same moment."""
        limit, answers = self._options.concurrent, Answers()
        await self._crowd("concurrent", 4 * limit, 10.0, answers, 400)
        return _counted("concurrent", limit, under_way(answers.used), answers)

    async def budget(self) -> Finding:
        """Until the day's budget is spent."""
        limit, answers = self._options.budget, Answers()
        with contextlib.closing(self._client("budget")) as client:
            while not answers.refused["insufficient_quota"]:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._options.clients // 4):
                        group.create_task(self._ask(client, answers))
                if set(answers.refused) - {"insufficient_quota", "rate_limit_exceeded"}:
                    raise RunError(f"the budget is not spent: {dict(answers.refused)}")
        spent = answers.tokens * PRICE / 1e6
        return _counted("budget", limit, spent, answers)


def _code(reader: AnswerReader) -> str:
    try:
        return str(orjson.loads(reader.body)["error"]["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"status {reader.status}"


def _counted(name: str, limit: float, count: float, answers: Answers) -> Finding:
    return Finding(
        name=name,
        limit=limit,
        most=count,
        least=count,
        mean=count,
        answers=len(answers.used),
        refused=dict(answers.refused),
    )


def came(log: Path) -> dict[str, float]:
    """Return when the head of each request came, by the proxy's own clock."""
    moments = {}
    for line in log.read_bytes().splitlines():
        record = orjson.loads(line)
        moments[record["request_id"]] = record["at"] - record["duration_ms"] / 1000.0
    return moments


def sliding(used: Sequence[tuple[float, int]], begun_s: float, end_s: float) -> list[int]:
    """Return the tokens of each whole minute between two moments, a step after the other."""
    ordered = sorted(used)
    minutes, first, last, total = [], 0, 0, 0
    at_s = begun_s
    while at_s + MINUTE_S <= end_s:
        while last < len(ordered) and ordered[last][0] < at_s + MINUTE_S:
            total += ordered[last][1]
            last += 1
        while first < last and ordered[first][0] < at_s:
            total -= ordered[first][1]
            first += 1
        minutes.append(total)
        at_s += STEP_S
    return minutes


def under_way(used: Sequence[Used]) -> int:
    """Return the most that were under way at a time; one that ends makes room for the next."""
    edges = sorted([(u.first_s, 1) for u in used] + [(u.last_s, -1) for u in used])
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most


def table(options: Options, findings: Sequence[Finding]) -> str:
    """Return the findings for people."""
    lines = [
        f"{options.clients} clients, {options.workers} workers, prompts of "
        f"{options.prompt_words} words, answers of {options.output_tokens} tokens",
        f"{'limit':<12}{'of':>10}{'most':>12}{'':>9}{'least':>12}{'':>9}{'mean':>9}"
        f"{'answers':>9}  refused",
    ]
    for f in findings:
        most, least, mean = (f"{100 * n / f.limit:.2f} %" for n in (f.most, f.least, f.mean))
        refused = ", ".join(f"{count} {code}" for code, count in sorted(f.refused.items())) or "0"
        lines.append(
            f"{f.name:<12}{f.limit:>10g}{f.most:>12g}{most:>9}{f.least:>12g}{least:>9}{mean:>9}"
            f"{f.answers:>9}  {refused}"
        )
    return "\n".join(lines)
