"""A start from an image against a cold one, by real dumps and real processes (CRIU, root).

An engine that starts slowly by real work (imports, a table of a gigabyte built hash by hash, whose
entries decide its answers) is started cold, dumped, and restored again and again, by the command
`doherty snapshot` as an operator would use it. Each start is timed from the command to the first
whole answer. What must hold:

* a restored copy answers at least ten times sooner than a cold start, every time;
* every answer, of copies alone, of two at once, and beside one under load, is the cold start's;
* one bit flipped in an image is found before the copy runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import orjson

from loadtest.client import Client, RequestError, parse_url
from loadtest.run import RunError

SUMMARY = "starts from an image on disk against cold ones (needs CRIU)"
GAIN_MIN = 10.0
PORT = 30000
MODEL = "demo"
PROMPTS = tuple(f"{word}, and what comes after it" for word in ("one", "two", "three", "four"))
ANSWER_TOKENS = 24
COMMAND_S_MAX = 900.0
POLL_S = 0.01
LOAD_REQUESTS_AT_ONCE = 4
_DOHERTY = (sys.executable, "-m", "backends.cli")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    tables_mib: int = 1024
    restores: int = 20
    pairs: int = 3
    loaded: int = 5
    judge_gain: bool = True


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to the first answer, and answers that were not the cold start's."""

    tables_mib: int
    cold_s: float
    dump_s: float
    image_mib: int
    restored_s: tuple[float, ...]
    paired_s: tuple[float, ...]  # of two started at once, the later
    loaded_s: tuple[float, ...]  # beside a copy under load
    load_answers: int
    answers: int
    wrong: int
    damage: str  # what was said of a damaged image; "" when it was used
    damage_s: float
    judge_gain: bool = True  # an engine that starts quickly has little to gain

    @property
    def gain(self) -> float:
        """By how much the slowest start of a single copy beats the cold start."""
        return self.cold_s / max(self.restored_s)

    @property
    def kept_promises(self) -> bool:
        gained = self.gain >= GAIN_MIN or not self.judge_gain
        return gained and self.wrong == 0 and bool(self.damage)


def add_arguments(command: argparse.ArgumentParser) -> None:
    base = Options()
    add = command.add_argument
    add("--tables-mib", type=int, default=base.tables_mib, help="of the engine (%(default)s)")
    add("--restores", type=int, default=base.restores, help="in a row (%(default)s)")
    add("--quick", action="store_true", help="a small engine and few restores; gain not judged")
    add("--json", metavar="FILE", help="also write the findings as JSON")


def run(args: argparse.Namespace) -> int:
    options = Options(tables_mib=args.tables_mib, restores=args.restores)
    if args.quick:
        options = Options(tables_mib=8, restores=2, pairs=1, loaded=1, judge_gain=False)
    finding = asyncio.run(measure(options))
    print(table(finding))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps(msgspec.to_builtins(finding)))
    return 0 if finding.kept_promises else 1


async def measure(options: Options) -> Finding:
    """Run all of it. Raises `RunError`."""
    with tempfile.TemporaryDirectory(prefix="doherty-snapshots-") as folder:
        stage = _Stage(Path(folder), options)
        await stage.probe()
        cold_s = await stage.cold()
        made = await stage.create()
        restored_s = [await stage.restored() for _ in range(options.restores)]
        paired_s = [await stage.two_at_once() for _ in range(options.pairs)]
        loaded_s, load_answers = await stage.beside_load()
        damage, damage_s = await stage.damaged()
        return Finding(
            tables_mib=options.tables_mib,
            cold_s=cold_s,
            dump_s=made["dump_s"],
            image_mib=int(made["image_bytes"]) // 2**20,
            restored_s=tuple(restored_s),
            paired_s=tuple(paired_s),
            loaded_s=tuple(loaded_s),
            load_answers=load_answers,
            answers=stage.answers,
            wrong=stage.wrong,
            damage=damage,
            damage_s=damage_s,
            judge_gain=options.judge_gain,
        )


class _Stage:
    """The folder of images, and what the cold start answered."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._folder = folder
        self._options = options
        self._known: dict[str, str] = {}
        self._snapshot = ""
        self.answers = 0
        self.wrong = 0

    async def probe(self) -> None:
        status, out, err = await _command(*self._words("probe"))
        if status:
            raise RunError((out or err).strip())

    async def cold(self) -> float:
        """Start the engine as it is, outside of any cell; return the seconds to an answer."""
        begun_s = time.monotonic()
        port = PORT + random.randrange(1, 2000)
        argv = self._engine("127.0.0.1", port)
        async with _running(argv, self._folder / "cold.log") as process:
            url = f"http://127.0.0.1:{port}"
            await _until_answer(url, process)
            cold_s = time.monotonic() - begun_s
            self._known = {prompt: await _answer(url, prompt) for prompt in PROMPTS}
        return cold_s

    async def create(self) -> dict[str, float]:
        argv = ("--port", str(PORT), "--json", "--", *self._engine("0.0.0.0", PORT))  # noqa: S104  # of its cell
        status, out, err = await _command(*self._words("create"), *argv)
        if status:
            raise RunError(f"no image: {err.strip()}")
        made = json.loads(out)
        self._snapshot = made["snapshot"]
        return dict(made)

    async def restored(self) -> float:
        """Start a copy; return the seconds from the command to its first whole answer."""
        async with self._copy() as (url, begun_s):
            seconds = await self._first(url, begun_s)
            await self._check(url)
            return seconds

    async def two_at_once(self) -> float:
        async with contextlib.AsyncExitStack() as stack:
            copies = [self._copy(), self._copy()]
            found = await asyncio.gather(*(stack.enter_async_context(copy) for copy in copies))
            seconds = await asyncio.gather(*(self._first(*one) for one in found))
            if found[0][0] == found[1][0]:
                raise RunError(f"two copies are on {found[0][0]}")
            await asyncio.gather(*(self._check(url) for url, _ in found))
            return max(seconds)

    async def beside_load(self) -> tuple[list[float], int]:
        """Restore beside a copy that is asked without pause; its answers are judged, too."""
        before = self.answers
        async with self._copy() as (url, _):
            stop = asyncio.Event()

            async def ask() -> None:
                while not stop.is_set():
                    await self._check(url)

            askers = [asyncio.ensure_future(ask()) for _ in range(LOAD_REQUESTS_AT_ONCE)]
            seconds = [await self.restored() for _ in range(self._options.loaded)]
            stop.set()
            await asyncio.gather(*askers)
        return seconds, self.answers - before

    async def damaged(self) -> tuple[str, float]:
        """Flip one bit in the pages; return what the restore says, and after how long."""
        pages = max(self._folder.rglob("pages-*.img"), key=lambda path: path.stat().st_size)
        place = random.randrange(pages.stat().st_size)
        with pages.open("r+b") as file:
            file.seek(place)
            octet = file.read(1)[0]
            file.seek(place)
            file.write(bytes([octet ^ 1 << random.randrange(8)]))
        begun_s = time.monotonic()
        status, _, err = await _command(*self._words("restore"), self._snapshot, "--once")
        return (err.strip() if status and "damaged" in err else ""), time.monotonic() - begun_s

    @contextlib.asynccontextmanager
    async def _copy(self) -> AsyncIterator[tuple[str, float]]:
        begun_s = time.monotonic()
        argv = (*_DOHERTY, *self._words("restore"), self._snapshot, "--json")
        async with _running(argv, None) as process:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), COMMAND_S_MAX)
            if not line:
                raise RunError("the restore ended without a copy; see above")
            yield json.loads(line)["url"], begun_s

    async def _first(self, url: str, begun_s: float) -> float:
        self._judge(PROMPTS[0], await _answer(url, PROMPTS[0]))
        return time.monotonic() - begun_s

    async def _check(self, url: str) -> None:
        for prompt in PROMPTS:
            self._judge(prompt, await _answer(url, prompt))

    def _judge(self, prompt: str, text: str) -> None:
        self.answers += 1
        self.wrong += text != self._known[prompt]

    def _words(self, action: str) -> tuple[str, ...]:
        return ("snapshot", action, "--dir", str(self._folder / "snapshots"))

    def _engine(self, host: str, port: int) -> tuple[str, ...]:
        return (
            *(*_DOHERTY, "simulator", "--host", host, "--port", str(port), "--model", MODEL),
            *("--profile", "fast", "--start-tables-mib", str(self._options.tables_mib)),
        )


def table(finding: Finding) -> str:
    """Return the findings as lines."""
    single = sorted(finding.restored_s)
    rows = [
        f"an engine that builds {finding.tables_mib:,} MiB of tables at its start",
        f"cold                 {finding.cold_s:8.2f} s to the first answer",
        f"dump                 {finding.dump_s:8.2f} s, image {finding.image_mib:,} MiB",
        f"restored x {len(single):<3}       {statistics.median(single):8.2f} s median, "
        f"{single[0]:.2f} to {single[-1]:.2f}: {finding.gain:.1f} times sooner at the slowest",
        f"two at once x {len(finding.paired_s):<3}    {_spread(finding.paired_s)}",
        f"beside load x {len(finding.loaded_s):<3}    {_spread(finding.loaded_s)}, "
        f"{finding.load_answers:,} answers meanwhile",
        f"answers              {finding.answers:,}, {finding.wrong} of them wrong",
        f"a flipped bit        {finding.damage or 'NOT FOUND'} ({finding.damage_s:.2f} s)",
        "all promises kept" if finding.kept_promises else "PROMISES BROKEN",
    ]
    return "\n".join(rows)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):8.2f} s median, at most {max(seconds):.2f}"


async def _command(*words: str) -> tuple[int, str, str]:
    """Run `doherty` to its end; return status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *_DOHERTY,
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_S_MAX):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise RunError(
            f"doherty {' '.join(words[:2])} took longer than {COMMAND_S_MAX:g} s"
        ) from None
    return process.returncode or 0, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def _running(
    argv: Sequence[str], log: Path | None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program as long as the block; its output goes to `log`, or can be read."""
    with contextlib.ExitStack() as stack:
        output = asyncio.subprocess.PIPE if log is None else stack.enter_context(log.open("wb"))
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=output
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _until_answer(url: str, process: asyncio.subprocess.Process) -> None:
    end_s = time.monotonic() + COMMAND_S_MAX
    while True:
        with contextlib.suppress(RequestError):
            await _answer(url, PROMPTS[0])
            return
        if process.returncode is not None or time.monotonic() > end_s:
            raise RunError(f"the engine does not answer (status {process.returncode})")
        await asyncio.sleep(POLL_S)


async def _answer(url: str, prompt: str) -> str:
    """Return what the engine answers. Raises `RequestError`."""
    client = Client(parse_url(url), time.monotonic)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": ANSWER_TOKENS}
    try:
        answer = await client.post("/v1/completions", orjson.dumps(body))
        if answer.status != 200:
            raise RunError(f"{url} answered {answer.status}")
        return str(orjson.loads(answer.body)["choices"][0]["text"])
    finally:
        client.close()
