"""A log that cannot be written loses lines, and that is all that happens."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typing_extensions import override

from backends.log import Log
from backends.providers.process import LocalProcess, ProcessProvider, find_carriers
from tests.fakes.world import World, configuration

WRITE_TWICE = "from backends.log import Log; log = Log(); log.tell('one'); log.tell('two')"


class Broken(io.StringIO):
    """A stream that fails as it is told to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    @override
    def write(self, text: str) -> int:
        raise self._error


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.close()


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space"), ValueError("closed")]
)
def test_no_stream_makes_it_raise(error: Exception) -> None:
    Log(Broken(error)).tell("event")


def test_a_closed_pipe_does_not_change_how_a_program_ends() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-c", WRITE_TWICE], stderr=writer, check=False)
    os.close(writer)
    assert run.returncode == 0


def test_a_program_without_standard_error_goes_on() -> None:
    line = f'exec "{sys.executable}" -c "{WRITE_TWICE}; print(3)" 2>&-'
    run = subprocess.run(["/bin/sh", "-c", line], stdout=subprocess.PIPE, check=False)
    assert (run.returncode, run.stdout) == (0, b"3\n")


async def test_a_spawn_that_cannot_be_told_of_is_a_spawn(world: World) -> None:
    world.stream = Broken(BrokenPipeError(32, "Broken pipe"))
    await world.start(configuration(world.run_dir, "[{engine: simulator}]"))
    assert world.states() == ["ready"]
    (launch,) = world.journal.live.values()
    assert [process.pid for process in world.provider.spawned] == [launch.pid]


@pytest.mark.parametrize("failing", ["read_stat", "LocalProcess"])
async def test_what_cannot_be_watched_does_not_live_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    """As when no descriptor is free: the caller is told that nothing was started, so be it."""

    def out_of_descriptors(*_args: object, **_flags: object) -> LocalProcess:
        raise OSError(24, "Too many open files")

    provider = ProcessProvider()
    fails = {"read_stat": lambda _pid: None, "LocalProcess": out_of_descriptors}
    monkeypatch.setattr(f"backends.providers.process.{failing}", fails[failing])
    with pytest.raises(OSError, match="open"):
        provider.spawn(("sleep", "60"), dict(os.environ), "launch-watched", tmp_path / "log")
    monkeypatch.undo()
    assert find_carriers({"launch-watched"}) == {}
