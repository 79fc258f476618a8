"""The official OpenAI client as the judge: its own tests, directly and through Doherty.

The client's source distribution is fetched by pip in the version that is installed, and the tests
of the calls that engines serve are run by pytest against an engine that answers by the schema,
first directly and then with a proxy between. Beside them come calls of our own for what those tests
leave out: streams read to their end, and left before it. What passes directly must pass through.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator
from importlib import metadata
from pathlib import Path

import msgspec

from loadtest import report
from loadtest.client import Client
from loadtest.fleet import free_ports, get, local
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.sdk_engine import SdkEngine

SUMMARY = "run the official OpenAI client's own tests through the proxy"
TEST_FILES = (
    "chat/test_completions.py",
    "test_completions.py",
    "test_models.py",
    "test_embeddings.py",
)
START_TIMEOUT_S = 60.0
FETCH_TIMEOUT_S = 600.0
TESTS_TIMEOUT_S = 600.0
POLL_INTERVAL_S = 0.05
_RESULT = re.compile(r"(?m)^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (tests/\S+)(?: - (.*))?$")
_MODEL_NAME = re.compile(r'model="([^"]+)"|"((?:ft:)?[a-z]+-[\w.:-]+)",')


class Suite(msgspec.Struct, frozen=True):
    """One set of checks, run twice: for each its complaint, empty when it passed."""

    name: str
    direct: dict[str, str]
    through: dict[str, str]

    @property
    def broken(self) -> dict[str, str]:
        """What passes directly and does not pass through."""
        return {
            check: self.through.get(check, "was not run")
            for check, complaint in self.direct.items()
            if not complaint and self.through.get(check, "was not run")
        }


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--quick", action="store_true", help="only our own calls: nothing is fetched")
    add(
        "--sources", type=Path, metavar="FOLDER", help="of the client, unpacked; nothing is fetched"
    )
    add("--cache", type=Path, default=_default_cache(), help="where they are kept (%(default)s)")
    add("--json", metavar="FILE", help="also write everything as JSON; - is standard output")


def run(args: argparse.Namespace) -> int:
    """Run the suites. Returns 1 when the proxy loses what passes without it."""
    sources: Path | None = args.sources
    if not args.quick and sources is None:
        sources = fetch_sources(metadata.version("openai"), args.cache)
    suites = asyncio.run(run_suites(None if args.quick else sources))
    print(table(suites), file=sys.stderr if args.json == "-" else sys.stdout)
    octets = report.to_json([msgspec.to_builtins(suite) for suite in suites])
    if args.json == "-":
        sys.stdout.buffer.write(octets)
    elif args.json:
        Path(args.json).write_bytes(octets)
    whole = all(suite.direct and not suite.broken for suite in suites)
    return 0 if whole else 1


def table(suites: list[Suite]) -> str:
    """Return the figures, and what fails where."""
    width = max(len(suite.name) for suite in suites)
    lines = [f"{'':{width}}  {'direct':>11}  {'through Doherty':>15}"]
    for suite in suites:
        direct, through = (
            f"{sum(not complaint for complaint in results.values())} of {len(suite.direct)}"
            for results in (suite.direct, suite.through)
        )
        lines.append(f"{suite.name:{width}}  {direct:>11}  {through:>15}")
    for suite in suites:
        failing = {check: complaint for check, complaint in suite.direct.items() if complaint}
        lines += [f"fails directly: {check}: {why}" for check, why in failing.items()]
        lines += [f"fails through: {check}: {why}" for check, why in suite.broken.items()]
    return "\n".join(lines)


# --- the client's sources --------------------------------------------------------------------


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "doherty"


def fetch_sources(version: str, cache: Path) -> Path:
    """Return the folder of the client's sources, fetched if they are not there yet."""
    folder = cache / f"openai-{version}"
    if (folder / "tests").is_dir():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(_download(version, temporary))
        archives = list(Path(temporary).glob("openai-*.tar.gz"))
        if len(archives) != 1:
            raise RunError(f"openai {version} has no source distribution")
        cache.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            archive.extractall(cache, filter="data")
    if not (folder / "tests").is_dir():
        raise RunError(f"the source distribution of openai {version} has no tests")
    return folder


async def _download(version: str, folder: str) -> None:
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    what = ("--no-deps", "--no-binary", ":all:", "--dest", folder, f"openai=={version}")
    status, said = await _finished([*pip, *what], FETCH_TIMEOUT_S)
    if status:
        raise RunError(f"pip could not fetch openai {version}: {said[-500:].strip()}")


def models_of(sources: Path) -> set[str]:
    """Return the names of models that the client's tests ask for."""
    names: set[str] = set()
    for file in TEST_FILES:
        text = (sources / "tests" / "api_resources" / file).read_text("utf-8")
        names |= {first or second for first, second in _MODEL_NAME.findall(text)}
    return names


# --- the runs --------------------------------------------------------------------------------


async def run_suites(sources: Path | None) -> list[Suite]:
    """Run everything against one engine, directly and through one proxy."""
    # Only here: every other command does without the second that this import takes.
    from loadtest.sdk_calls import run_calls  # noqa: PLC0415

    engine = SdkEngine(models_of(sources) if sources else ())
    suites: list[Suite] = []
    async with engine.serving(), _proxy_before(engine) as proxy_url:
        direct_url = f"{engine.url}/v1"
        if sources is not None:
            direct = await run_tests(sources, direct_url)
            through = await run_tests(sources, proxy_url)
            suites.append(Suite(f"tests of openai {metadata.version('openai')}", direct, through))
        direct = await run_calls(direct_url, engine)
        suites.append(Suite("calls of our own", direct, await run_calls(proxy_url, engine)))
    return suites


async def run_tests(sources: Path, base_url: str) -> dict[str, str]:
    """Run the client's tests with pytest; return for each what went wrong, or nothing."""
    flags = ("-q", "-r", "pfEsxX", "--tb=line", "-o", "addopts=", "-p", "no:cacheprovider")
    files = [f"tests/api_resources/{file}" for file in TEST_FILES]
    command = [sys.executable, "-m", "pytest", *flags, *files]
    settings = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    settings |= {"TEST_API_BASE_URL": base_url, "COLUMNS": "200"}
    _, said = await _finished(command, TESTS_TIMEOUT_S, cwd=sources, env=settings)
    found = _RESULT.findall(said)
    if not found:
        raise RunError(f"the client's tests did not run: {said[-1000:].strip()}")
    return {name: "" if word == "PASSED" else why or word.lower() for word, name, why in found}


async def _finished(
    command: list[str],
    timeout_s: float,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a program to its end; return its status and what it said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
        env=env,
    )
    try:
        async with asyncio.timeout(timeout_s):
            said, _ = await process.communicate()
    except TimeoutError as error:
        raise RunError(f"{' '.join(command[:4])} took more than {timeout_s:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode("utf-8", "replace")


@contextlib.asynccontextmanager
async def _proxy_before(engine: SdkEngine) -> AsyncIterator[str]:
    """A proxy with its defaults before the engine; yields its base URL."""
    ports = free_ports()
    places = ("--port", str(ports.proxy), "--admin-port", str(ports.admin))
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "--worker-urls", engine.url, *places),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us, and we stop it
        )
        try:
            await _until_served(process, ports.proxy, engine)
            yield f"http://127.0.0.1:{ports.proxy}/v1"
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _until_served(process: asyncio.subprocess.Process, port: int, engine: SdkEngine) -> None:
    clock = WallClock()
    client = Client(local(port), clock.now_s)
    try:
        while True:
            status, body = await get(client, "/v1/models")
            if status == 200 and all(f'"{name}"'.encode() in body for name in engine.models):
                return
            if process.returncode is not None:
                raise RunError(f"the proxy ended with {process.returncode}")
            if clock.now_s() > START_TIMEOUT_S:
                raise RunError(f"the proxy was not ready in {START_TIMEOUT_S:g} s")
            await asyncio.sleep(POLL_INTERVAL_S)
    finally:
        client.close()
