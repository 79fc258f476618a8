"""An engine started cold, dumped and restored by `doherty snapshot`, and what it answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import orjson

from loadtest.client import Client, RequestError, parse_url
from loadtest.run import RunError

PORT = 30000
MODEL = "demo"
PROMPTS = tuple(f"{word}, and what comes after it" for word in ("one", "two", "three", "four"))
ANSWER_TOKENS = 24
COMMAND_S_MAX = 900.0
POLL_S = 0.01
LOAD_REQUESTS_AT_ONCE = 4
DOHERTY = (sys.executable, "-m", "backends.cli")


class Stage:
    """The folder of images, and what the cold start answered."""

    def __init__(self, folder: Path, tables_mib: int) -> None:
        self._folder = folder
        self.tables_mib = tables_mib
        self.known: dict[str, str] = {}
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
        async with running(argv, self._folder / "cold.log") as process:
            url = f"http://127.0.0.1:{port}"
            await _until_answer(url, process)
            cold_s = time.monotonic() - begun_s
            self.known = {prompt: await answer(url, prompt) for prompt in PROMPTS}
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

    async def beside_load(self, count: int) -> tuple[list[float], int]:
        """Restore beside a copy that is asked without pause; its answers are judged, too."""
        before = self.answers
        async with self._copy() as (url, _):
            stop = asyncio.Event()

            async def ask() -> None:
                while not stop.is_set():
                    await self._check(url)

            askers = [asyncio.ensure_future(ask()) for _ in range(LOAD_REQUESTS_AT_ONCE)]
            seconds = [await self.restored() for _ in range(count)]
            stop.set()
            await asyncio.gather(*askers)
        return seconds, self.answers - before

    async def damaged(self) -> tuple[str, float]:
        """Flip one bit in the pages; return what the restore says, and after how long."""
        flip_a_bit(self._folder)
        begun_s = time.monotonic()
        status, _, err = await _command(*self._words("restore"), self._snapshot, "--once")
        return (err.strip() if status and "damaged" in err else ""), time.monotonic() - begun_s

    @contextlib.asynccontextmanager
    async def _copy(self) -> AsyncIterator[tuple[str, float]]:
        begun_s = time.monotonic()
        argv = (*DOHERTY, *self._words("restore"), self._snapshot, "--json")
        async with running(argv, None) as process:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), COMMAND_S_MAX)
            if not line:
                raise RunError("the restore ended without a copy; see above")
            yield json.loads(line)["url"], begun_s

    async def _first(self, url: str, begun_s: float) -> float:
        self.judge(PROMPTS[0], await answer(url, PROMPTS[0]))
        return time.monotonic() - begun_s

    async def _check(self, url: str) -> None:
        for prompt in PROMPTS:
            self.judge(prompt, await answer(url, prompt))

    def judge(self, prompt: str, text: str) -> None:
        self.answers += 1
        self.wrong += text != self.known[prompt]

    def _words(self, action: str) -> tuple[str, ...]:
        return ("snapshot", action, "--dir", str(self._folder / "snapshots"))

    def _engine(self, host: str, port: int) -> tuple[str, ...]:
        return (
            *(*DOHERTY, "simulator", "--host", host, "--port", str(port), "--model", MODEL),
            *("--profile", "fast", "--start-tables-mib", str(self.tables_mib)),
        )


def flip_a_bit(folder: Path) -> None:
    """Damage the largest file of pages under `folder` by as little as there is."""
    pages = max(folder.rglob("pages-*.img"), key=lambda path: path.stat().st_size)
    place = random.randrange(pages.stat().st_size)
    with pages.open("r+b") as file:
        file.seek(place)
        octet = file.read(1)[0]
        file.seek(place)
        file.write(bytes([octet ^ 1 << random.randrange(8)]))


async def _command(*words: str) -> tuple[int, str, str]:
    """Run `doherty` to its end; return status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *DOHERTY,
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
async def running(
    argv: Sequence[str], log: Path | None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program as long as the block; its output goes to `log`, or can be read."""
    with contextlib.ExitStack() as stack:
        output = asyncio.subprocess.PIPE if log is None else stack.enter_context(log.open("wb"))
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=None if log is None else asyncio.subprocess.STDOUT,
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
            await answer(url, PROMPTS[0])
            return
        if process.returncode is not None or time.monotonic() > end_s:
            raise RunError(f"the engine does not answer (status {process.returncode})")
        await asyncio.sleep(POLL_S)


async def answer(url: str, prompt: str) -> str:
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
