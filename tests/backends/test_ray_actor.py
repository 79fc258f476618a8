"""What runs on a node, without Ray: the actor's own class, its guard, and an engine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.providers import ray_actor, ray_guard
from backends.providers.process import find_carriers, kill_remains, read_stat
from backends.providers.ray_actor import EngineActor, environment
from tests.fakes.programs import until

LAUNCH_ID = "test-ray-actor"
MARK = f"DOHERTY_LAUNCH_ID={LAUNCH_ID}"
GUARD = Path(ray_guard.__file__).read_text()


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    left = find_carriers({LAUNCH_ID})
    kill_remains({LAUNCH_ID})
    assert not left


def actor(script: str, *args: str, ports: tuple[int, ...] = ()) -> EngineActor:
    argv = ("python3", "-c", script, *args)
    return EngineActor(GUARD, MARK, argv, {"A": "1"}, ports, lambda: ("10.0.0.7", "node-7"))


def told(
    one: EngineActor, claim: Callable[[dict[str, Any], str], bool]
) -> tuple[dict[str, Any], str]:
    """Ask as a manager does until `claim` holds; return the last answer and all of the text."""
    text, taken = "", 0
    end_s = time.monotonic() + 20
    while True:
        said = one.poll(taken, 0.5)
        text, taken = text + said["text"], said["upto"]
        if claim(said, text):
            return said, text
        assert time.monotonic() < end_s, (said, text)


def ended(said: dict[str, Any], _text: str) -> bool:
    return said["ended"] is not None


def test_an_end_comes_with_its_status_and_after_all_that_was_said() -> None:
    said, text = told(actor("print('é' * 100_000); raise SystemExit(4)"), ended)
    assert said["ended"] == {"status": 4 << 8}
    assert (said["host"], said["node"]) == ("10.0.0.7", "node-7")
    assert text.encode("latin-1").decode().strip() == "é" * 100_000


def test_of_much_output_the_last_part_is_kept_and_the_gap_is_told() -> None:
    one = actor(f"print('x' * {ray_actor.KEPT_BYTES_MAX + 5000}); print('last')")
    until(lambda: one._ended is not None, "the end")  # nobody asked meanwhile
    first = one.poll(0, 0.0)
    assert first["lost"] == 5000 + len("\nlast\n")
    _, text = told(one, ended)
    assert text.endswith("x\nlast\n")


def test_an_answer_that_nobody_took_is_given_again() -> None:
    one = actor("import time; print('one', flush=True); time.sleep(60)")
    said, _ = told(one, lambda _said, text: text == "one\n")
    assert one.poll(0, 0.0)["text"] == "one\n"  # it was not acknowledged
    assert one.poll(said["upto"], 0.0)["text"] == ""
    assert one.poll(-1, 0.0)["text"] == ""  # one that comes later goes on there
    one.signal(signal.SIGKILL)
    said, _ = told(one, ended)
    assert said["ended"] == {"status": signal.SIGKILL}


def test_an_engine_that_ends_leaves_nothing_not_even_what_left_its_group() -> None:
    script = (
        "import subprocess, sys;"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        "start_new_session=True); print('ok')"
    )
    _, text = told(actor(script), ended)
    assert text == "ok\n"
    until(lambda: not find_carriers({LAUNCH_ID}), "nothing left")


def test_an_engine_ends_with_its_actor_however_that_died() -> None:
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from backends.providers import ray_guard
from backends.providers.ray_actor import EngineActor
one = EngineActor(Path(ray_guard.__file__).read_text(), {MARK!r},
                  ("python3", "-c", "import time; time.sleep(60)"), {{}}, (), lambda: ("h", "n"))
while not one.poll(0, 0.1)["pid"]:
    pass
print(one.poll(0, 0.0)["pid"], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert read_stat(pid) is not None
        process.kill()
    until(lambda: not find_carriers({LAUNCH_ID}), "the engine ends")


def test_a_guard_that_is_killed_leaves_no_engine() -> None:
    one = actor("import time; time.sleep(60)")
    said, _ = told(one, lambda said, _text: said["pid"] > 0)
    stat = read_stat(said["pid"])
    assert stat is not None
    parent = int(Path(f"/proc/{said['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    said, _ = told(one, ended)
    assert said["ended"] == {"status": signal.SIGKILL}


def test_a_program_that_is_not_there_is_named() -> None:
    argv = ("no-such-engine", "serve")
    one = EngineActor(GUARD, MARK, argv, {}, (), lambda: ("h", "n"))
    said, _ = told(one, ended)
    assert re.search("No such file or directory: '?no-such-engine", said["ended"]["problem"])


def test_a_port_that_somebody_has_there_is_told_and_nothing_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said, _ = told(actor("print('started')", ports=(port,)), ended)
    assert said["ended"] == {"problem": f"port {port} of its node 10.0.0.7 is taken"}
    assert said["text"] == ""


def test_an_engine_gets_the_cards_that_ray_gave_and_none_of_rays_secrets() -> None:
    node = {
        "CUDA_VISIBLE_DEVICES": "3",
        "RAY_AUTH_TOKEN": "secret",
        "RAY_JOB_ID": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": "/models",
        "PATH": "/bin",
    }
    env = environment(node, {"PATH": "/opt/bin", "B": "2"}, "MARK=7")
    assert env == {
        "CUDA_VISIBLE_DEVICES": "3",
        "HF_HOME": "/models",
        "PATH": "/opt/bin",
        "B": "2",
        "MARK": "7",
    }
    pinned = environment(node, {"CUDA_VISIBLE_DEVICES": "0,1"}, "MARK=7")
    assert pinned["CUDA_VISIBLE_DEVICES"] == "0,1"  # a pool that pins itself knows why
