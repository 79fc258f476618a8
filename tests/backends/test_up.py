"""`doherty up` as a person has it: one command, real processes, the simulator, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from backends.providers.process import read_stat
from proxy.contract import FleetSnapshot, decode_snapshot

PATIENCE_S = 60.0
T = TypeVar("T")

pytestmark = pytest.mark.faults

CONFIG = """\
manager: {scrape_interval_secs: 0.2, restart_backoff_secs: 0.2}
models:
  - name: demo
    pools:
      - {engine: simulator, replicas: 2, stop_grace_secs: 5, args: [--profile, fast]}
"""


def until(look: Callable[[], T | None], what: Callable[[], str]) -> T:
    give_up_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_s:
        if seen := look():
            return seen
        time.sleep(0.05)
    raise AssertionError(f"in vain: {what()}")


ROOT = Path(__file__).parents[2]


class Run:
    """One `doherty up` with its output in a file."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.output_path = folder / "output"
        config = folder / "config.yaml"
        if not config.exists():
            config.write_text(CONFIG)
        environ = {k: v for k, v in os.environ.items() if not k.startswith("DOHERTY_")}
        with self.output_path.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "backends.cli", "up", str(config)),
                    *("--port", "0", "--admin-port", "0", "--manager-port", "0"),
                    *("--run-dir", str(folder / "run"), *flags),
                ],
                env=environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def printed(self, pattern: str) -> re.Match[str]:
        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.output)
            assert found or self.process.poll() is None, f"it ended early:\n{self.output}"
            return found

        return until(look, lambda: f"{pattern} in:\n{self.output}")

    def ready(self) -> tuple[str, str]:
        """Wait for the banner; return the endpoint and the manager."""
        endpoint = self.printed(r"Ready: (http://\S+)/v1")[1]
        return endpoint, self.printed(r"--manager-url (http://\S+)")[1]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[Run]]:
    runs = [Run(tmp_path)]
    yield runs
    for run in runs:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.terminate()
        run.process.wait(PATIENCE_S)


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def fleet_of(manager: str) -> FleetSnapshot | None:
    try:
        with urllib.request.urlopen(manager + "/v1/fleet", timeout=10) as answer:
            return decode_snapshot(answer.read())
    except OSError:
        return None


def pids_of(manager: str) -> list[int]:
    """Wait until both replicas are ready; return their pids."""

    def look() -> list[int] | None:
        fleet = fleet_of(manager)
        ready = [r.pid for r in fleet.replicas if r.state.value == "ready"] if fleet else []
        return ready if len(ready) == 2 else None

    return until(look, lambda: "two ready replicas")


def alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.alive


def test_one_command_serves_survives_kills_and_leaves_nothing(runs: list[Run]) -> None:
    run = runs[0]
    endpoint, manager = run.ready()
    replicas = pids_of(manager)
    assert run.output.startswith("starting manager, offline service and proxy (logs: ")
    run.printed(r"demo-0 is ready \(simulator, http://127\.0\.0\.1:\d+\)")

    pasted = run.output.split("\ncurl")[1].split("\n\n")[0]
    answer = subprocess.run(
        ["bash", "-c", "curl -sS" + pasted], capture_output=True, text=True, check=True
    ).stdout
    assert answer.rstrip().endswith("data: [DONE]")
    watched = [*(sys.executable, "-m", "backends.cli", "top", "--once")]
    watched += ["--url", run.printed(r"admin +(http://\S+)")[1]]
    seen = subprocess.run(watched, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert re.search(r"^demo-0 +ready +0 ", seen, re.MULTILINE), seen

    manager_pid = int((run.folder / "run" / "lock").read_text())
    os.kill(manager_pid, signal.SIGKILL)
    assert status_of(endpoint + "/readyz") == 200, "the proxy needs no manager to live"
    run.printed("manager was killed by SIGKILL; starting it again")
    until(lambda: (run.folder / "run" / "lock").read_text() != f"{manager_pid}\n", lambda: "lock")
    assert pids_of(manager) == replicas, "adopted, not started again"

    proxy_pid = int((run.folder / "run" / "proxy.pid").read_text().split()[0])
    os.kill(proxy_pid, signal.SIGKILL)
    run.printed("proxy was killed by SIGKILL; starting it again")
    until(lambda: status_of(endpoint + "/readyz") == 200, lambda: "the proxy")
    assert pids_of(manager) == replicas

    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(PATIENCE_S) == 0
    assert run.output.endswith("stopped\n")
    assert "without stopping" not in run.output
    assert not any(alive(pid) for pid in replicas)
    assert status_of(endpoint + "/readyz") == 0
    assert (run.folder / "run" / "logs" / "access.log").exists()


def test_an_end_just_after_the_manager_was_killed_leaves_nothing_either(runs: list[Run]) -> None:
    run = runs[0]
    _, manager = run.ready()
    replicas = pids_of(manager)
    os.kill(int((run.folder / "run" / "lock").read_text()), signal.SIGKILL)
    run.printed("manager was killed by SIGKILL; starting it again")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(PATIENCE_S) == 0
    assert "the manager ended without stopping demo-0 and demo-1: it is started once" in run.output
    assert run.output.endswith("stopped\n")
    assert not any(alive(pid) for pid in replicas)


def test_a_manager_that_cannot_sweep_is_told_with_what_it_left(runs: list[Run]) -> None:
    run = runs[0]
    _, manager = run.ready()
    replicas = pids_of(manager)
    (run.folder / "config.yaml").write_text("models: 7")
    os.kill(int((run.folder / "run" / "lock").read_text()), signal.SIGKILL)
    run.printed("manager was killed by SIGKILL; starting it again")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(PATIENCE_S) == 1
    for number, pid in enumerate(replicas):
        assert f"demo-{number} was not stopped (pid {pid}; log: " in run.output
        os.killpg(pid, signal.SIGKILL)
    assert run.output.endswith("stopped, but for what is named above\n")


def test_a_reload_reaches_manager_and_proxy(runs: list[Run]) -> None:
    runs[0].ready()
    config = runs[0].folder / "config.yaml"
    config.write_text(CONFIG.replace("replicas: 2", "replicas: 3"))
    runs[0].process.send_signal(signal.SIGHUP)
    runs[0].printed("demo-2 is ready")
    log = runs[0].folder / "run" / "logs" / "proxy.log"
    until(lambda: "reloaded; changed: nothing" in log.read_text(), log.read_text)


def test_an_upgrade_of_the_proxy_and_one_that_fails() -> None:
    with tempfile.TemporaryDirectory(
        prefix="up-", dir="/tmp"
    ) as folder:  # a socket's path is short
        run = Run(Path(folder))
        try:
            endpoint, _ = run.ready()
            note = run.folder / "run" / "proxy.pid"
            old = note.read_text()
            run.process.send_signal(signal.SIGUSR2)
            run.printed(r"proxy was upgraded \(pid \d+\)")
            assert note.read_text() != old
            assert not alive(int(old.split()[0]))
            assert status_of(endpoint + "/readyz") == 200
            good = (run.folder / "config.yaml").read_text()
            (run.folder / "config.yaml").write_text("proxy: {policy: best}")
            run.process.send_signal(signal.SIGUSR2)
            run.printed("the new proxy exited with status 2 before it took over; the old one goes")
            assert status_of(endpoint + "/readyz") == 200
            (run.folder / "config.yaml").write_text(good)
            # A signal to the proxy itself: its successor is a stranger until ours takes over
            before = note.read_text()
            os.kill(int(before.split()[0]), signal.SIGUSR2)
            run.printed("proxy exited with status 0; starting it again in 0.5 s")
            log = run.folder / "run" / "logs" / "proxy.log"
            took_over = "took over from the proxy that ran before"
            until(lambda: log.read_text().count(took_over) == 3, log.read_text)
            assert note.read_text() != before
            assert status_of(endpoint + "/readyz") == 200
            run.process.send_signal(signal.SIGTERM)
            assert run.process.wait(PATIENCE_S) == 0
            assert status_of(endpoint + "/readyz") == 0
        finally:
            run.process.kill()
            run.process.wait()


def test_a_second_up_on_the_run_folder(runs: list[Run]) -> None:
    runs[0].ready()
    second = subprocess.run(
        [
            *(sys.executable, "-m", "backends.cli", "up", "--port", "0", "--admin-port", "0"),
            *("--manager-port", "0", "--run-dir", str(runs[0].folder / "run")),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 1
    assert re.search(r"a manager \(pid \d+\) already runs on", second.stderr)


def test_what_cannot_start_is_shown_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    run = Run(tmp_path, f"--access-log={tmp_path}/no/such/folder/access.log")
    assert run.process.wait(PATIENCE_S) == 1
    assert "the proxy ended before it was ready" in run.output
    assert "Traceback" not in run.output.split("the end of")[0]
    assert run.output.endswith("stopped\n")
