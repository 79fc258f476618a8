"""The manager as a real process over real, tiny engines: kills, adoption, an ordered end."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.contract import ReplicaRecord
from tests.fakes.region import PATIENCE_S, Region, alive, until

pytestmark = pytest.mark.faults


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    region = Region(tmp_path)
    yield region
    region.clean()


def test_from_start_to_an_ordered_end(region: Region) -> None:
    region.write(replicas=2, args=["--ready-after-s", "0.3"])
    manager = region.start()
    replicas = region.replicas("ready", 2)
    for replica in replicas:
        assert os.getpgid(replica.pid) == replica.pid == os.getsid(replica.pid)
        assert replica.models == ("m",)
        assert replica.load is not None
        assert replica.load.kv_capacity_tokens == 1600
        log = (region.run_dir / "logs" / f"{replica.replica_id}.log").read_text()
        assert f"listening on {replica.url.rsplit(':', 1)[1]}" in log
    manager.terminate()
    assert manager.wait(PATIENCE_S) == 0
    assert not any(alive(replica.pid) for replica in replicas)


def test_a_killed_engine_comes_back(region: Region) -> None:
    region.write()
    region.start()
    (before,) = region.replicas("ready")
    os.kill(before.pid, signal.SIGKILL)

    def back() -> ReplicaRecord | None:
        fleet = region.fleet()
        replica = fleet.replicas[0] if fleet else None
        return replica if replica and replica.restarts == 1 and replica.pid else None

    after = until(back, "the restart")
    assert after.pid != before.pid
    region.replicas("ready")
    assert '"reason":"killed by SIGKILL"' in region.log


def test_one_that_keeps_dying_backs_off_and_its_neighbour_serves(region: Region) -> None:
    bad = {"name": "bad", "args": ["--die-after-s", "0.05", "--ready-after-s", "60"]}
    region.write(bad)
    region.start()
    until(lambda: region.log.count('"event":"replica_backoff"') >= 3, "three bad lives")
    fleet = region.fleet()
    assert fleet is not None
    good, dying = fleet.replicas
    assert (good.state.value, good.restarts) == ("ready", 0)
    assert (dying.replica_id, dying.restarts >= 2) == ("bad-0", True)
    assert "exited with status 3" in region.log


def test_deaf_to_sigterm_and_with_a_child_it_is_killed_as_a_group(region: Region) -> None:
    region.write(args=["--ignore-sigterm", "--child"])
    manager = region.start()
    (replica,) = region.replicas("ready")
    log = region.run_dir / "logs" / "m-0.log"
    child = int(log.read_text().split("child ")[1].split()[0])
    assert alive(child)
    manager.terminate()
    assert manager.wait(PATIENCE_S) == 0
    assert not alive(replica.pid)
    until(lambda: not alive(child), "the end of the child")
    assert '"event":"replica_killing"' in region.log


def test_what_a_dead_engine_leaves_behind_is_killed(region: Region) -> None:
    region.write(args=["--child"])
    region.start()
    (replica,) = region.replicas("ready")
    child = int((region.run_dir / "logs" / "m-0.log").read_text().split("child ")[1].split()[0])
    os.kill(replica.pid, signal.SIGKILL)
    until(lambda: not alive(child), "the end of the child")


def test_a_killed_manager_is_followed_by_one_that_adopts(region: Region) -> None:
    region.write(replicas=2)
    manager = region.start()
    before = region.replicas("ready", 2)
    manager.kill()
    manager.wait()
    second = region.start()
    after = region.replicas("ready", 2)
    assert [(r.replica_id, r.pid, r.url) for r in after] == [
        (r.replica_id, r.pid, r.url) for r in before
    ]
    assert {r.restarts for r in after} == {0}
    os.kill(after[0].pid, signal.SIGKILL)  # not our child: seen all the same
    until(lambda: '"cause":"exited"' in region.log, "the death of an adopted process")
    region.replicas("ready", 2)
    second.terminate()
    assert second.wait(PATIENCE_S) == 0
    assert not any(alive(r.pid) for r in after)


def test_a_manager_that_died_between_spawn_and_note_finds_its_child(region: Region) -> None:
    region.write()
    manager = region.start()
    (before,) = region.replicas("ready")
    manager.kill()
    manager.wait()
    journal = region.run_dir / "journal"
    intents = [line for line in journal.read_text().splitlines() if '"entry":"intent"' in line]
    journal.write_text(intents[0] + "\n" + '{"entry":"started","laun')
    region.start()
    (after,) = region.replicas("ready")
    assert after.pid == before.pid
    assert f'"pid":{before.pid}' in journal.read_text(), "noted now"


def test_what_the_configuration_forgot_is_stopped(region: Region) -> None:
    region.write(replicas=2)
    manager = region.start()
    before = region.replicas("ready", 2)
    manager.kill()
    manager.wait()
    region.write(replicas=1)
    region.start()
    (after,) = region.replicas("ready")
    assert after.pid == before[0].pid
    until(lambda: not alive(before[1].pid), "the end of the second")


def test_detached_replicas_run_on(region: Region) -> None:
    region.write()
    manager = region.start("--detach")
    (before,) = region.replicas("ready")
    manager.terminate()
    assert manager.wait(PATIENCE_S) == 0
    assert alive(before.pid)
    last = region.start()
    (after,) = region.replicas("ready")
    assert after.pid == before.pid
    last.terminate()
    assert last.wait(PATIENCE_S) == 0
    assert not alive(before.pid)


def test_sighup_takes_a_good_file_and_refuses_a_bad_one(region: Region) -> None:
    region.write()
    manager = region.start()
    region.replicas("ready")
    region.path.write_text("modles: []")
    manager.send_signal(signal.SIGHUP)
    until(lambda: '"event":"reload_failed"' in region.log, "the refusal")
    assert "did you mean 'models'?" in region.log
    region.replicas("ready")
    region.write(replicas=2)
    manager.send_signal(signal.SIGHUP)
    region.replicas("ready", 2)


def test_a_second_manager_on_the_run_folder_is_refused(region: Region) -> None:
    region.write()
    first = region.start()
    region.replicas("ready")
    second = region.start()
    assert second.wait(PATIENCE_S) == 1
    assert f"a manager (pid {first.pid}) already runs on {region.run_dir}" in region.log
    region.replicas("ready")


def test_a_port_in_use_is_told_before_anything_starts(region: Region) -> None:
    region.write()
    with socket.create_server(("127.0.0.1", region.port)):
        assert region.start().wait(PATIENCE_S) == 1
    assert f"port {region.port} on 127.0.0.1 cannot be used" in region.log
    assert not (region.run_dir / "journal").exists()


def test_a_second_signal_hurries(region: Region) -> None:
    region.write(args=["--running", "1", "--ignore-sigterm"], stop_grace_secs=600.0)
    manager = region.start()
    (replica,) = region.replicas("ready")
    manager.terminate()
    region.replicas("draining")
    manager.terminate()
    assert manager.wait(PATIENCE_S) == 0
    assert not alive(replica.pid)


def test_nobody_reads_the_log_and_its_engines_are_kept_all_the_same(region: Region) -> None:
    region.write(replicas=2, args=["--ready-after-s", "0.2"])
    reader, writer = os.pipe()
    os.close(reader)
    manager = region.start("--detach", output=writer)
    os.close(writer)
    before = {replica.pid for replica in region.replicas("ready", 2)}
    assert "not started" not in (region.run_dir / "journal").read_text()
    manager.terminate()
    assert manager.wait(PATIENCE_S) == 0
    last = region.start()
    assert {replica.pid for replica in region.replicas("ready", 2)} == before
    last.terminate()
    assert last.wait(PATIENCE_S) == 0
    assert not any(map(alive, before))
