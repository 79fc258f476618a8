"""What a kill -9 of a replica, of the manager or of a proxy worker does to clients under load.

A whole Doherty runs, requests begin at a steady pace that no answer slows, and in the middle of it
one process is killed. Every request ends as one of

* complete      the stream came to its `[DONE]`;
* visibly cut   it had begun, and the client could tell: an error event, or a close within it;
* failed        an error status or no answer although it had been handed to what was killed: it may
                have been computed, so it is not repeated; where a proxy is left to say so, the
                answer is 502 with x-should-retry;
* lost          any other failure. Must never happen;
* silently cut  HTTP says complete and the `[DONE]`, or the end of the JSON, is missing. Must never
                happen.

Most requests are short and streamed: an engine sends the head of a stream at once, so a kill finds
them begun. Some have a long prompt and want their answer whole, so that the kill also meets
requests in prefill, or in generation, of whose answer nothing has been sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import orjson

from loadtest.client import Client, RequestError
from loadtest.fleet import MODEL, Fleet, FleetOptions, Replica, fleet, get, local, replicas
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.wire import AnswerReader

VICTIMS = ("replica", "manager", "worker")
POLL_INTERVAL_S = 0.02
RECOVERY_TIMEOUT_S = 60.0
# Every fifth prompt has some 9,000 tokens, and no two share a beginning that a cache could hold.
LONG_EVERY = 5
LONG_WORDS = 6000
SHORT_WORDS = 200


class FaultOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The load, and when the kill comes."""

    victims: tuple[str, ...] = VICTIMS
    rate: float = 30.0  # requests begun per second
    output_tokens: int = 150
    before: float = 3.0  # s of load before the kill
    after: float = 5.0  # s of load after it


class Stream(msgspec.Struct):
    """One request as the client saw it."""

    begun_s: float
    ended_s: float = 0.0
    replica: str = ""
    outcome: str = "open"
    detail: str = ""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one kill did. Requests are split by whether they were in flight at the kill."""

    victim: str
    killed: str
    requests: int
    in_flight: int
    complete: int
    cut: int  # visibly
    failed: int  # handed to the victim, without an answer
    lost: int  # any other failure: must be 0
    silent: int  # must be 0
    recovery_s: float
    details: tuple[str, ...]


async def run_faults(
    options: FaultOptions, fleet_options: FleetOptions, say: Callable[[str], None]
) -> list[Finding]:
    """Return one finding per victim. Raises `RunError` when Doherty does not come up or back."""
    findings = []
    for victim in options.victims:
        say(f"{victim}: starting {fleet_options.replicas} replicas")
        async with fleet(fleet_options.policies[-1], fleet_options) as running:
            findings.append(await _one(victim, running, options, say))
    return findings


async def _one(
    victim: str, running: Fleet, options: FaultOptions, say: Callable[[str], None]
) -> Finding:
    clock = WallClock()
    client = Client(local(running.ports.proxy), clock.now_s)
    manager = Client(local(running.ports.manager), clock.now_s)
    streams: list[Stream] = []
    try:
        async with asyncio.TaskGroup() as group:
            load = group.create_task(_load(client, clock, streams, options, group))
            await asyncio.sleep(options.before)
            known = await replicas(manager)
            pid, name = choose_victim(victim, running.pid, known, streams)
            say(f"{victim}: kill -9 {name} (pid {pid})")
            killed_s = clock.now_s()
            os.kill(pid, signal.SIGKILL)
            recovery_s = await _recovered(victim, pid, name, running, manager, clock)
            await load
    except* RunError as failures:
        raise RunError(f"{failures.exceptions[0]}; see {running.folder}") from failures
    finally:
        client.close()
        manager.close()
    return judge(victim, name, streams, killed_s, recovery_s)


async def _load(
    client: Client,
    clock: WallClock,
    streams: list[Stream],
    options: FaultOptions,
    group: asyncio.TaskGroup,
) -> None:
    """Begin streams at a steady pace, whatever becomes of them."""
    total = int(options.rate * (options.before + options.after))
    start_s = clock.now_s()
    for number in range(total):
        await asyncio.sleep(max(0.0, start_s + number / options.rate - clock.now_s()))
        stream = Stream(begun_s=clock.now_s())
        streams.append(stream)
        group.create_task(_stream(client, clock, stream, number, options.output_tokens))


async def _stream(
    client: Client, clock: WallClock, stream: Stream, number: int, output_tokens: int
) -> None:
    body = request_body(number, output_tokens)
    reader = AnswerReader()
    try:
        async with asyncio.timeout(RECOVERY_TIMEOUT_S):
            await client.post("/v1/chat/completions", body, reader=reader)
        stream.outcome, stream.detail = outcome(reader, streamed=not is_long(number))
    except RequestError as error:
        begun = reader.status == 200
        told = "told by an error event" if reader.stream_error else "told by the close"
        stream.outcome = "cut" if begun else "failed"
        stream.detail = told if begun else error.kind
    except TimeoutError:
        stream.outcome, stream.detail = "failed", "no end"
    stream.replica = reader.headers.get("x-doherty-replica", "")
    stream.ended_s = clock.now_s()


def is_long(number: int) -> bool:
    return number % LONG_EVERY == 0


def request_body(number: int, output_tokens: int) -> bytes:
    """Return request `number` of the load: short and streamed, or long and wanted whole."""
    long = is_long(number)
    prompt = f"conversation {number}: " + "words " * (LONG_WORDS if long else SHORT_WORDS)
    return orjson.dumps(
        {
            "messages": [{"role": "user", "content": prompt}],
            "model": MODEL,
            "stream": not long,
            "max_tokens": output_tokens,
        }
    )


def outcome(reader: AnswerReader, *, streamed: bool) -> tuple[str, str]:
    """Say what an answer that ended as HTTP should was to one who wanted a stream, or did not."""
    if reader.status != 200:
        retry = " with x-should-retry" if reader.headers.get("x-should-retry") == "true" else ""
        return "failed", f"status {reader.status}{retry}"
    if not streamed:
        return ("complete", "") if is_json(reader.body) else ("silent", "not JSON")
    if reader.stream_error:
        return "cut", "told by an error event, as complete"
    return ("complete", "") if reader.done_seen else ("silent", "no [DONE]")


def is_json(body: bytes) -> bool:
    try:
        return bool(orjson.loads(body))
    except orjson.JSONDecodeError:
        return False


def choose_victim(
    victim: str, up_pid: int, known: list[Replica], streams: list[Stream]
) -> tuple[int, str]:
    """Return pid and name of the process to kill. Raises `RunError` when there is none."""
    if victim == "replica":
        busy = [stream.replica for stream in streams if stream.replica]
        chosen = max(known, key=lambda r: (busy.count(r.replica_id), r.replica_id), default=None)
        if chosen is not None and chosen.pid:
            return chosen.pid, chosen.replica_id
    else:
        wanted = "proxy.worker" if victim == "worker" else "manager"
        for pid in descendants(up_pid):
            if wanted in command_line(pid):
                return pid, victim
    raise RunError(f"no {victim} to kill was found below process {up_pid}")


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, parents first.

    By the parent that each names: the kernel's list of children may leave out some of them while
    others end (proc(5)).
    """
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            parent = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += sorted(children.get(each, ()))
    return found[1:]


def command_line(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode("utf-8", "replace")


async def _recovered(
    victim: str, pid: int, name: str, running: Fleet, manager: Client, clock: WallClock
) -> float:
    """Wait until another process stands where the killed one stood; return the seconds."""
    start_s = clock.now_s()
    admin = Client(local(running.ports.admin), clock.now_s)
    try:
        while clock.now_s() - start_s < RECOVERY_TIMEOUT_S:
            if victim == "worker":
                _, page = await get(admin, "/metrics")
                back = workers_whole(page, running.workers)
            else:
                known = await replicas(manager)
                ready = {r.replica_id: r.pid for r in known if r.state == "ready"}
                back = ready.get(name, pid) != pid if victim == "replica" else bool(ready)
            if back:
                return clock.now_s() - start_s
            await asyncio.sleep(POLL_INTERVAL_S)
    finally:
        admin.close()
    raise RunError(f"{name} did not come back in {RECOVERY_TIMEOUT_S:g} s")


def workers_whole(page: bytes, wanted: int) -> bool:
    """Say whether these metrics tell of a worker started again, and of every place filled."""
    values = dict(
        re.findall(rb"^doherty_(workers|worker_restarts_total) (\d+)", page, re.MULTILINE)
    )
    return (
        int(values.get(b"worker_restarts_total", 0)) > 0
        and int(values.get(b"workers", 0)) == wanted
    )


def judge(
    victim: str, name: str, streams: list[Stream], killed_s: float, recovery_s: float
) -> Finding:
    """Count what became of the requests. Pure."""
    counts = Counter(_judge_one(victim, name, stream, killed_s) for stream in streams)
    details = Counter(
        f"{stream.outcome}: {stream.detail}" for stream in streams if stream.outcome != "complete"
    )
    return Finding(
        victim=victim,
        killed=name,
        requests=len(streams),
        in_flight=sum(stream.begun_s <= killed_s < stream.ended_s for stream in streams),
        complete=counts["complete"],
        cut=counts["cut"],
        failed=counts["failed"],
        lost=counts["lost"],
        silent=counts["silent"],
        recovery_s=recovery_s,
        details=tuple(f"{count} {what}" for what, count in sorted(details.items())),
    )


def _judge_one(victim: str, name: str, stream: Stream, killed_s: float) -> str:
    if stream.outcome in ("complete", "silent"):
        return stream.outcome
    if victim == "replica":
        # A dying process takes connections until its kernel has torn it down, some milliseconds.
        return stream.outcome if stream.replica == name else "lost"
    in_flight = stream.begun_s <= killed_s < stream.ended_s
    return stream.outcome if victim == "worker" and in_flight else "lost"


COLUMNS = ("requests", "in_flight", "complete", "cut", "failed", "lost", "silent")


def table(findings: list[Finding]) -> str:
    """Return the findings as text."""
    head = ["kill -9 of", *COLUMNS, "back after"]
    rows = [
        [f.victim, *(str(getattr(f, column)) for column in COLUMNS), f"{f.recovery_s:.2f} s"]
        for f in findings
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    lines += [f"{f.victim}: {', '.join(f.details)}" for f in findings if f.details]
    return "\n".join(lines)


def kept_promises(findings: list[Finding]) -> bool:
    """Nothing silent, nothing lost that had not begun on what was killed."""
    return all(f.lost == 0 and f.silent == 0 for f in findings)
