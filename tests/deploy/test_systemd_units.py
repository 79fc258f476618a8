"""The units of `deploy/systemd`, by systemd's own judgement, and what they start by ours."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.config import ProxyConfig
from tests.fakes.programs import ROOT

FOLDER = ROOT / "deploy" / "systemd"
SERVICES = ("doherty", "doherty-manager", "doherty-offline", "doherty-proxy")
UNITS = (*(f"{name}.service" for name in SERVICES), "doherty-proxy.socket")
# `systemd-analyze security` counts from 0 (nothing exposed) to 10. What runs engines must let them
# make code, share memory and reach devices.
EXPOSURE_MAX = {
    "doherty": 4.0,
    "doherty-manager": 4.0,
    "doherty-offline": 2.0,
    "doherty-proxy": 2.0,
}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not installed (Debian: apt-get install systemd)",
)


class Unit(configparser.RawConfigParser):
    """A unit's keys; of one that is given several times the last."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#",))
        self.optionxform = str  # type: ignore[assignment, method-assign]
        text = (FOLDER / name).read_text().replace("\\\n", " ")
        self.text = text
        self.read_string(text)


@needs_systemd
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    units = tmp_path / "etc" / "systemd" / "system"
    programs = (Path("opt/doherty/bin/doherty"), Path("bin/kill"))
    for program in programs:
        (tmp_path / program).parent.mkdir(parents=True)
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    units.mkdir(parents=True)
    for unit in UNITS:
        shutil.copy(FOLDER / unit, units)
    # What every machine has, so that what remains unknown is ours.
    for target in ("network-online", "multi-user", "sockets", "sysinit", "basic", "shutdown"):
        (units / f"{target}.target").write_text("[Unit]\nDescription=x\n")
    judged = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={tmp_path}", *UNITS],
        capture_output=True,
        check=False,
    )
    assert (judged.stderr.decode(), judged.returncode) == ("", 0)


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_little_is_exposed(name: str) -> None:
    path = str(FOLDER / f"{name}.service")
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", path],
        capture_output=True,
        check=True,
    )
    said = re.search(rb"Overall exposure level[^:]*: ([\d.]+)", judged.stdout)
    assert said is not None
    assert float(said[1]) <= EXPOSURE_MAX[name]


@pytest.mark.parametrize("name", SERVICES)
def test_commands_are_ones_that_the_program_takes(name: str) -> None:
    program, command, *words = Unit(f"{name}.service")["Service"]["ExecStart"].split()
    assert program == "/opt/doherty/bin/doherty"
    shown = subprocess.run(
        [sys.executable, "-m", "backends.cli", command, "--help"],
        capture_output=True,
        check=True,
        cwd=ROOT,
    ).stdout.decode()
    flags = [word for word in words if word.startswith("--")]
    assert [flag for flag in flags if flag not in shown] == []


def test_the_end_of_a_proxy_is_waited_for() -> None:
    unit = Unit("doherty-proxy.service")["Service"]
    config = ProxyConfig()
    longest_s = config.shutdown_grace_period_secs + config.drain_settle_secs
    assert float(unit["TimeoutStopSec"]) > longest_s
    assert unit["NotifyAccess"] == "all", "a successor speaks before it is the main process"
    assert unit["KillMode"] == "mixed", "workers are told by their supervisor"


def test_engines_outlive_their_manager() -> None:
    unit = Unit("doherty-manager.service")["Service"]
    assert unit["KillMode"] == "process"
    assert "--detach-on-exit" in unit["ExecStart"]


@pytest.mark.parametrize("name", SERVICES)
def test_keys_come_as_credentials(name: str) -> None:
    text = Unit(f"{name}.service").text
    given = set(re.findall(r"^LoadCredential=(\w+):", text, re.MULTILINE))
    named = dict(re.findall(r"DOHERTY_(\w+KEY)_FILE=%d/(\w+)", text))
    assert set(named.values()) == given
    assert {key.lower() for key in named} == given
    assert not re.search(r"DOHERTY_\w*KEY=|--\w*-?key[ =]", text)


def test_the_socket_is_the_proxys() -> None:
    unit = Unit("doherty-proxy.socket")["Socket"]
    assert unit["FileDescriptorName"] != "admin", "that one is for operators"
    assert int(unit["ListenStream"].rpartition(":")[2]) == ProxyConfig().port
