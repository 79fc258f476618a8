"""Pictures of the dashboard for its guide: `python -m tests.dashboard.shots [FOLDER]`.

A whole Doherty runs, with simulated replicas of two models, one of which is scaled. People talk to
it in turns, below a few heads that many share; then many more come at once; then an engine is
killed again and again until it is not started at once. The pictures are what a browser shows.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import aiohttp
from PIL import Image

from loadtest.words import WORDS
from tests.fakes.browser import Browser, wait
from tests.fakes.programs import CLI, Program, fetch, until

FOLDER = Path(__file__).parents[2] / "deploy" / "guides" / "images"
OCTETS_MAX = 120_000
PATIENCE_S = 180.0  # of a machine that does much else
COLOURS = 255
CONFIG = """\
proxy: {workers: 2, access_log: 'off'}
models:
  - name: chat-8b
    pools:
      - engine: simulator
        autoscale: {min: 2, max: 5, scaledown_window_secs: 120}
        target_inputs: 4
        max_inputs: 12
        args: [--profile, h200-8b, --max-num-seqs, '16', --kv-cache-tokens, '60000',
               --time-scale, '0.5', --startup-seconds, '6']
  - name: code-8b
    pools:
      - engine: simulator
        replicas: 2
        args: [--profile, h200-8b-sglang, --max-num-seqs, '16', --kv-cache-tokens, '60000',
               --time-scale, '0.5']
"""


class People:
    """Conversations with the endpoint, as many a second as are wanted at the moment."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.rate_per_s = 0.0
        self.begun = 0
        self._draw = random.Random("people")
        self._heads = [self._text(size) for size in (900, 600, 1200, 400, 800, 700)]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._come(),))
        self._over = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    def _text(self, words: int) -> str:
        return " ".join(self._draw.choices(WORDS, k=words))

    async def _come(self) -> None:
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            tasks = []
            while not self._over.is_set():
                pause_s = self._draw.expovariate(self.rate_per_s) if self.rate_per_s else 0.1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), pause_s)
                if self.rate_per_s and not self._over.is_set():
                    tasks.append(group.create_task(self._talk(session)))
            for task in tasks:
                task.cancel()

    async def _talk(self, session: aiohttp.ClientSession) -> None:
        self.begun += 1
        model, heads = self._draw.choice(
            (
                ("chat-8b", self._heads[:4]),
                ("chat-8b", self._heads[:4]),
                ("code-8b", self._heads[4:]),
            )
        )
        head = self._draw.choices(heads, weights=range(2 * len(heads), 0, -2))[0]
        messages = [{"role": "system", "content": head}]
        for _ in range(self._draw.randint(1, 3)):
            messages.append({"role": "user", "content": self._text(self._draw.randint(20, 160))})
            body = {
                "model": model,
                "messages": messages,
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": self._draw.randint(120, 500),
            }
            try:
                async with session.post(self.url + "/v1/chat/completions", json=body) as answer:
                    await answer.read()
            except (aiohttp.ClientError, TimeoutError):
                return
            messages.append({"role": "assistant", "content": self._text(60)})
            await asyncio.sleep(self._draw.uniform(0.5, 3.0))


class Studio:
    """A Doherty, its people, a browser, and where pictures go."""

    def __init__(self, up: Program, people: People, browser: Browser, folder: Path) -> None:
        self.people, self.browser, self.folder = people, browser, folder
        self.admin_url = up.until_said(r"admin +(http://\S+)")[1]
        self.manager_url = up.until_said(r"--manager-url (http://\S+)")[1]

    def open(self, width: int, height: int, *, dark: bool = False) -> None:
        self.browser.open(self.admin_url + "/", width=width, height=height, dark=dark)
        self.browser.until("document.body.dataset.drawn")

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Change the window under a page that stays, and so keeps its sparklines."""
        self.browser.resize(width, height, dark=dark)
        time.sleep(1.5)  # a view and its transitions

    def take(self, name: str, selector: str = "") -> None:
        """Keep what is seen, or one element of it, as a small PNG."""
        time.sleep(0.5)
        clip = {}
        if selector:
            box = self.browser.js(
                "const { x, y, width, height } = document.querySelector(arguments[0])"
                ".getBoundingClientRect();"
                "return { x: x + scrollX, y: y + scrollY, width, height, scale: 1 };",
                selector,
            )
            clip = {"clip": box, "captureBeyondViewport": True}
        shot = self.browser.command("Page.captureScreenshot", format="png", **clip)
        image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        path = self.folder / f"dashboard-{name}.png"
        image.save(path, optimize=True)
        if path.stat().st_size > OCTETS_MAX:
            dither, method = Image.Dither.NONE, Image.Quantize.MAXCOVERAGE
            image.quantize(COLOURS, method=method, dither=dither).save(path, optimize=True)
        octets = path.stat().st_size
        sys.stdout.write(f"{path.name}: {image.width} x {image.height}, {octets} octets\n")
        sys.stdout.flush()
        assert octets <= OCTETS_MAX, f"{path} is too large"

    def states(self) -> list[str]:
        replicas = fetch(self.manager_url + "/v1/fleet").value["replicas"]
        return [one.get("state", "ready") for one in replicas]

    def until(self, claim: Callable[[], bool], what: str) -> None:
        wait(claim, what)


def at_rest(studio: Studio) -> None:
    studio.open(1280, 1010)
    studio.people.rate_per_s = 1.2
    time.sleep(100)
    studio.take("rest")
    studio.resize(400, 880)
    studio.take("400px")
    studio.resize(1280, 1010, dark=True)
    studio.take("dark")
    studio.resize(1280, 1010)


def in_a_burst(studio: Studio) -> None:
    studio.people.rate_per_s = 7.0
    time.sleep(28)
    studio.take("burst")
    studio.take("ring", "#ring")
    studio.take("scaling", "#scaling")
    browser = studio.browser
    browser.js("document.querySelector('#explain [name=model]').value = 'chat-8b'")
    browser.find("#explain [name=prompt]").send_keys(
        "Why is the sky blue, and why is it dark at night?"
    )
    browser.click("#explain [data-part=submit]")
    browser.until("!document.querySelector('#explain [data-part=result]').hidden")
    studio.take("explain", "#explain")
    studio.people.rate_per_s = 1.2


def with_one_failed(studio: Studio) -> None:
    """Kill one engine whenever it comes back, until it waits long enough to be seen waiting."""
    studio.browser.js("window.scrollTo(0, 0)")
    name = ""
    for _ in range(60):
        replicas = fetch(studio.manager_url + "/v1/fleet").value["replicas"]
        name = name or replicas[0]["replica_id"]
        one = next(each for each in replicas if each["replica_id"] == name)
        if one.get("state") == "backoff" and one.get("restarts", 0) >= 3:
            break
        if one.get("state") != "backoff" and one.get("pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one["pid"], signal.SIGKILL)
        time.sleep(0.5)
    studio.browser.until("document.querySelector('#replicas tr[data-trouble]') !== null")
    studio.take("failed")


@contextlib.contextmanager
def studio_in(folder: Path, pictures: Path) -> Iterator[Studio]:
    config = folder / "doherty.yaml"
    config.write_text(CONFIG)
    ports = ("--port=0", "--admin-port=0", "--manager-port=0", "--no-offline")
    argv = (*CLI, "up", config.name, "--run-dir=run", *ports)
    up = Program(argv, folder / "up.log", cwd=folder)
    try:
        said = until(lambda: re.search(r"Ready: (http://\S+)/v1", up.said), "ready", PATIENCE_S)
        url = said[1]
        with Browser() as browser, People(url) as people:
            yield Studio(up, people, browser, pictures)
    finally:
        up.end()


def main() -> int:
    parser = argparse.ArgumentParser(description="Take pictures of the dashboard.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--only", choices=("rest", "burst", "failed"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    scenes = {"rest": at_rest, "burst": in_a_burst, "failed": with_one_failed}
    with tempfile.TemporaryDirectory() as folder, studio_in(Path(folder), options.folder) as studio:
        for name, scene in scenes.items():
            if options.only in (None, name):
                scene(studio)
    return 0


if __name__ == "__main__":
    sys.exit(main())
