"""Real snapshots of simulated engines, for tests: cells that are started, and ended with the test.

Tests that need CRIU are skipped by name where it is not, with what the probe says.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from backends.providers.base import LAUNCH_ID_VARIABLE
from backends.snapshots.base import Capability, Snapshot, SnapshotKey
from backends.snapshots.cells import LINK_PREFIX
from backends.snapshots.criu import CriuSnapshots
from backends.snapshots.probing import find_criu
from tests.fakes.programs import ROOT, environment, fetch, until

PORT = 30000
KEY = SnapshotKey(
    pool="demo", model="demo", engine="simulator", engine_version="1", launch_hash="abc"
)
SIMULATOR = (
    *(sys.executable, "-m", "backends.simulator", "--host", "0.0.0.0", "--port", str(PORT)),
    *("--profile", "fast", "--model", "demo"),
)


@functools.cache
def capability() -> Capability:
    """Return whether snapshots work here; asked for once a run of tests."""
    with tempfile.TemporaryDirectory() as folder:
        return find_criu(os.environ, Path(folder)).capability


def need_criu() -> None:
    """Skip the test where snapshots cannot work."""
    found = capability()
    if not found.works:
        pytest.skip(f"no snapshots here: {found.reason}")


class Celled:
    """One cell as a manager would have started it."""

    def __init__(self, argv: Sequence[str], host: str, launch_id: str, log_path: Path) -> None:
        self.host = host
        link = argv[argv.index("--link") + 1]
        self.number = int(link.removeprefix(LINK_PREFIX))
        self.url = f"http://{host}:{PORT}"
        self.launch_id = launch_id
        self.log_path = log_path
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment({LAUNCH_ID_VARIABLE: launch_id}),
                start_new_session=True,
            )
        self.pid = self.process.pid

    def get(self, path: str) -> Any:
        """Return an answer as soon as there is one."""

        def answer() -> Any:
            assert self.process.poll() is None, self.log_path.read_text()
            try:
                return fetch(self.url + path)
            except OSError:
                return None

        return until(answer, f"an answer of {self.url}{path}")

    def answer(self, prompt: str, max_tokens: int = 16) -> Any:
        """Return the engine's answer, a completion."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": max_tokens}
        answer = fetch(self.url + "/v1/completions", json.dumps(body).encode())
        assert answer.status == 200, answer.text
        return answer.value

    def ask(self, prompt: str, max_tokens: int = 16) -> str:
        """Return the words that it answers."""
        text: str = self.answer(prompt, max_tokens)["choices"][0]["text"]
        return text


class Stage:
    """A folder of images, and cells that end with the test."""

    def __init__(self, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
        self.folder = folder
        self.told: list[tuple[str, dict[str, object]]] = []
        self.snapshots = CriuSnapshots(folder / "snapshots", environ, tell=self._tell)
        self._cells: list[Celled] = []

    def _tell(self, event: str, **fields: object) -> None:
        self.told.append((event, fields))

    def start(self, argv: Sequence[str] = SIMULATOR) -> Celled:
        """Start `argv` in a cell."""
        launch_id = uuid.uuid4().hex
        enclosure = self.snapshots.enclose(launch_id, argv)
        return self._add(Celled(enclosure.argv, enclosure.host, launch_id, self._log(launch_id)))

    def restore(self, snapshot: Snapshot) -> Celled:
        """Start a copy of an image; it need not be there yet."""
        launch_id = uuid.uuid4().hex
        enclosure = self.snapshots.restore(snapshot, launch_id)
        return self._add(Celled(enclosure.argv, enclosure.host, launch_id, self._log(launch_id)))

    async def create(self, cell: Celled, key: SnapshotKey = KEY) -> Snapshot:
        return await self.snapshots.create(cell.pid, key, PORT, lambda *_: None)

    def _add(self, cell: Celled) -> Celled:
        self._cells.append(cell)
        return cell

    def _log(self, launch_id: str) -> Path:
        return self.folder / f"{launch_id}.log"

    def close(self) -> None:
        for cell in self._cells:
            if cell.process.poll() is None:
                cell.process.kill()
            cell.process.wait()


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    need_criu()
    made = Stage(folder)
    try:
        yield made
    finally:
        made.close()
