"""A proxy that is short of descriptors, or of memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from loadtest.siege.engine import Engine, request_body
from loadtest.siege.findings import Figure, Finding, at_most, kibibytes, promise, timing
from loadtest.siege.slow import whole
from loadtest.siege.target import Proxy
from loadtest.siege.traffic import HEAD, Raw, connect, numbers, post

DESCRIPTORS = 64
STARVED_CPU_MAX = 0.05
WELL_S_MAX = 1.0

MEMORY_BYTES = 512 << 20
BODY_BYTES = 64 << 20
PIECE_BYTES = 256 * 1024
BODY_LIMIT_S = 60.0
REFUSALS = (413, 429, 503)


async def descriptors_gone(*, quick: bool) -> Finding:
    """More clients than descriptors, each with a request; then they leave."""
    count, seconds = (100, 0.5) if quick else (200, 5.0)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    async with Engine() as engine, Proxy(engine.url, limit=limit) as proxy:
        clients: list[Raw] = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                clients.append(await connect(proxy.port))
                clients[-1].write(post(request_body("hold", next(numbers))))
        await asyncio.sleep(0.5)
        before_s, begin_s = proxy.cpu_s(), time.monotonic()
        await asyncio.sleep(seconds)
        share = (proxy.cpu_s() - before_s) / (time.monotonic() - begin_s)
        waiting = sum(not raw.first_s for raw in clients)
        for raw in clients:
            raw.close()
        well_s = await proxy.serves(request_body("answer", next(numbers)), 10.0)
        figures = (
            Figure(what="clients", value=f"{count}, of which {len(engine.got)} reached the engine"),
            Figure(what="  of the rest were refused", value=str(len(clients) - waiting)),
            at_most("processor while starved", share, STARVED_CPU_MAX, "{:.1%}".format),
            promise("serves when they have left", "yes" if well_s is not None else "no", "yes",
                    met=well_s is not None),
            timing("  after", 99.0 if well_s is None else well_s, WELL_S_MAX),
            *await whole(proxy),
        )  # fmt: skip
    return Finding(scenario="descriptors gone", figures=figures)


async def memory_cap(*, quick: bool) -> Finding:
    """Large bodies, all at once, under a memory limit that cannot hold them."""
    try:
        with _memory_group(MEMORY_BYTES) as group:
            figures: list[Figure] = []
            for name, size_max in (("default", 0), ("64 MiB", BODY_BYTES)):
                figures += await _large_bodies(name, size_max, 5 if quick else 50, group)
    except OSError as error:
        return Finding(scenario="memory cap", skipped=f"no memory cgroup can be made: {error}")
    return Finding(scenario="memory cap", figures=tuple(figures))


async def _large_bodies(name: str, size_max: int, count: int, group: Path) -> list[Figure]:
    flags = ("--max-payload-size", str(size_max)) if size_max else ()

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    async with Engine() as engine, Proxy(engine.url, flags=flags, limit=join) as proxy:
        first = next(numbers)
        asked = [first, *(next(numbers) for _ in range(count - 1))]
        peak = asyncio.get_running_loop().create_task(_peak_rss(proxy))
        statuses = Counter(await asyncio.gather(*(_send_large(proxy.port, n) for n in asked)))
        peak.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await peak
        killed = not proxy.same_worker
        answered = statuses[200]
        said = ", ".join(f"{n} x {status or 'none'}" for status, n in sorted(statuses.items()))
        well_s = None if killed else await proxy.serves(request_body("answer", next(numbers)), 10.0)
        whole_figures = () if killed else await whole(proxy)
        allowed = {200, *REFUSALS} if size_max else {413}
        return [
            promise(f"{count} bodies of 64 MiB, limit {name}", said, "200, 413, 429 or 503",
                    met=set(statuses) <= allowed and sum(engine.got.values()) >= answered),
            promise("  the worker", "killed" if killed else "lives", "lives", met=not killed),
            promise("  serves afterwards", "no" if well_s is None else "yes", "yes",
                    met=well_s is not None),
            Figure(what="  memory of the worker, peak",
                   value=f"{kibibytes(proxy.peak_bytes)} of {kibibytes(MEMORY_BYTES)}"),
            *whole_figures,
        ]  # fmt: skip


async def _peak_rss(proxy: Proxy) -> None:
    while proxy.same_worker:
        with contextlib.suppress(OSError):
            proxy.peak_bytes = max(proxy.peak_bytes, proxy.rss_bytes())
        await asyncio.sleep(0.01)


async def _send_large(port: int, number: int) -> int:
    """Send a body as fast as it is taken, until it is whole or refused; return the status."""
    begin = request_body("answer", number)[:-4]
    end = b'"}]}'
    size = BODY_BYTES - 1024
    raw = await connect(port)
    raw.write(HEAD + b"content-length: %d\r\n\r\n" % size + begin)
    left = size - len(begin) - len(end)
    piece = b"x" * PIECE_BYTES
    limit_s = time.monotonic() + BODY_LIMIT_S
    while left > 0 and not raw.first_s and time.monotonic() < limit_s:
        if raw.transport.get_write_buffer_size() > PIECE_BYTES:
            await asyncio.sleep(0.002)
            continue
        raw.write(piece[:left])
        left -= min(left, PIECE_BYTES)
    if not raw.first_s:
        raw.write(end)
    await raw.until(lambda: raw.first_s > 0, limit_s - time.monotonic())
    raw.close()
    return raw.status


@contextlib.contextmanager
def _memory_group(limit_bytes: int) -> Iterator[Path]:
    """Make a memory cgroup, of version 2 or 1, and remove it. Raises `OSError`."""
    root = Path("/sys/fs/cgroup")
    version1 = root / "memory"
    if (root / "cgroup.controllers").is_file():
        parent, names = root, ("memory.max", "memory.swap.max")
    else:
        parent, names = version1, ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    group = parent / f"siege-{os.getpid()}"
    group.mkdir()
    try:
        (group / names[0]).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # not every kernel counts swap
            (group / names[1]).write_text("0" if parent is root else str(limit_bytes))
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.02)  # the kernel still buries the last process
        else:
            return
