"""The command line: what it accepts, what it says, and with which status it ends."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from typing_extensions import override

from backends import tracing
from backends.cli import main
from backends.failure import StartError
from backends.providers.process import read_stat
from backends.redact import HIDDEN, redacted, redacted_args
from backends.service import flags_of
from backends.settings import manager_config_of, offline_config_of, plan_of
from backends.status import table
from backends.up import refuse_left
from backends.up_plan import services, with_ports
from backends.up_words import banner, describe, models_down
from backends.versions import story
from proxy.config import ConfigError, parse_config
from proxy.contract import (
    FleetSnapshot,
    LoadSample,
    ReplicaRecord,
    ReplicaState,
    encode_snapshot,
)
from tests.fakes.certificates import Authority

GOOD = """\
proxy: {port: 9100, api_key: hush-hush}
manager: {port: 9102}
models:
  - name: m
    pools:
      - engine: vllm
        args: [--api-key, hush-hush, --max-num-batched-tokens, '8192']
        env: {HF_TOKEN: hush-hush, HF_HOME: /models}
"""


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return str(path)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from backends.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'aiohttp', 'asyncio', 'uvloop', 'yaml', 'msgspec'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == "[]"
    for command in (
        "up",
        "proxy",
        "manager",
        "offline",
        "simulator",
        "check",
        "status",
        "sleep",
        "wake",
    ):
        assert f"\n  {command} " in output


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"doherty \d\S*", lines[0])
    assert [line.split()[0] for line in lines[1:]] == ["python", "data", "engines"]


def test_version_names_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"doherty": "1.2", "vllm": "0.33.0"}
    monkeypatch.setattr("backends.versions.installed", known.get)
    assert story("/compiled").splitlines()[2:] == [
        "data path  machine code, /compiled",
        "engines    vllm 0.33.0",
    ]
    assert "the sources (see doherty compile)" in story(None)


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "\nserve:\n" in capsys.readouterr().out


def test_check_shows_the_settings_and_no_secret(
    good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", good]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{good}: ok\n")
    assert "port: 9100" in output
    assert "shutdown_grace_period_secs: 60.0" in output, "defaults are settings too"
    assert "'8192'" in output
    assert "/models" in output
    assert "hush-hush" not in output


def test_a_reader_that_has_seen_enough_is_no_fault(good: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        checked = subprocess.run(
            [sys.executable, "-m", "backends.cli", "check", good],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert checked.returncode == 0
    assert b"BrokenPipe" not in checked.stderr


FAULTS = [
    ("an unknown key", "proxxy: {}", ":1: unknown key 'proxxy'; did you mean 'proxy'?"),
    ("a wrong type", "proxy:\n  port: many", ":2: proxy.port: "),
    ("no YAML", "proxy: [", "not valid YAML"),
    ("an unknown engine", "models: [{name: m, pools: [{engine: x}]}]", "models[0].pools[0].engine"),
]


@pytest.mark.parametrize(("text", "message"), [c[1:] for c in FAULTS], ids=[c[0] for c in FAULTS])
@pytest.mark.parametrize("command", [["check"], ["manager", "--config"], ["up"]])
def test_a_faulty_file_is_told_with_status_2(
    command: list[str],
    text: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main([*command, str(path)]) == 2
    captured = capsys.readouterr()
    assert str(path) in captured.err
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == [path], "nothing was begun"


def test_check_asks_whether_the_engine_would_take_its_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with vLLM 0.26.0, and on one without."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_version.py").write_text('version = "0.26.0"\n')
    path = tmp_path / "c.yaml"
    text = (
        "models:\n- name: m\n  pools:\n  - engine: vllm\n    replicas: 2\n"
        "    args: [--max-num-{}, '3']\n    env: {{PYTHONPATH: {}}}\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    path.write_text(text.format("sequences", tmp_path))
    assert main(["check", str(path)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert told.err.startswith(f"{path}: model 'm': vllm 0.26.0 has no flag --max-num-sequences")
    assert told.out == ""
    path.write_text(text.format("seqs", tmp_path))
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().err == ""
    path.write_text(text.format("seqs", "/nowhere"))
    assert main(["check", str(path)]) == 0
    warned = capsys.readouterr().err
    assert warned.startswith(f"{path}: warning: model 'm': program 'vllm' was not found")
    assert warned.count("\n") == 1
    path.write_text(text.format("sequences", "/nowhere"))
    assert main(["check", str(path)]) == 0
    assert "vllm 0.33.0 has no flag --max-num-sequences; did you mean" in capsys.readouterr().err


def test_lines_of_batches_do_not_run_against_a_demand_for_certificates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue()
    path = tmp_path / "c.yaml"

    def config(mode: str, offline: str) -> str:
        path.write_text(
            f"proxy: {{tls_cert_path: {cert}, tls_key_path: {key}, tls_client_auth: {mode},\n"
            f"  tls_client_ca_path: {authority.path}}}\noffline: {{{offline}}}\n"
            "models: [{name: m, pools: [{engine: simulator}]}]\n"
        )
        return str(path)

    for mode, offline in (
        ("optional", ""),
        ("required", "spare_capacity: false"),
        ("required", "enabled: false"),
    ):
        assert main(["check", config(mode, offline)]) == 0
        assert capsys.readouterr().err == ""
    assert main(["check", config("required", "")]) == 0
    warned = capsys.readouterr().err
    assert "warning: proxy.tls_client_auth: required: lines of batches have no client" in warned
    plan = plan_of(given(config=str(path)), {})
    assert plan.locked_out is not None
    assert plan.locked_out in warned
    offline = services(plan, {}).offline
    assert offline is not None
    assert not any(flag.startswith("--proxy-url") for flag in offline.argv)


def test_check_without_a_file_and_with_a_missing_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert main(["check", "/no/such/file.yaml"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--schema"]) == 0
    assert "$defs" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flag", "name"), [("--port", "port"), ("--admin-port", "admin"), ("--manager-port", "manager")]
)
def test_up_tells_a_port_in_use_before_it_starts_anything(
    flag: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    ports = {"--port": "0", "--admin-port": "0", "--manager-port": "0"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        flags = [word for pair in (ports | {flag: str(port)}).items() for word in pair]
        assert main(["up", *flags, "--run-dir", str(folder)]) == 1
    error = capsys.readouterr().err
    assert f"port {port} on 127.0.0.1 is in use; " in error
    assert f"choose another with {flag}" in error
    assert not (folder / "logs").exists()


def test_up_wants_different_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    flags = ["--port", port, "--admin-port", port, "--manager-port", "0"]
    assert main(["up", *flags, "--run-dir", str(tmp_path / "run")]) == 1
    assert "are the same port" in capsys.readouterr().err


def test_up_refuses_to_make_an_orphan_of_an_earlier_proxy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stat = read_stat(os.getpid())  # a process that lives for certain
    assert stat is not None
    (tmp_path / "proxy.pid").write_text(f"{stat.pid} {stat.start_ticks}\n")
    flags = ["--port", "0", "--admin-port", "0", "--manager-port", "0"]
    assert main(["up", *flags, "--run-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"left its proxy running (pid {stat.pid})" in error
    assert f"kill {stat.pid}" in error
    assert not (tmp_path / "logs").exists(), "nothing was started"


@pytest.mark.parametrize("name", ["proxy", "offline"])
def test_a_note_of_one_that_is_gone_stops_nobody(name: str, tmp_path: Path) -> None:
    stat = read_stat(os.getpid())
    assert stat is not None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    refuse_left(tmp_path)  # no note at all
    note = tmp_path / f"{name}.pid"
    for text in ("", "words\n", f"{stat.pid}\n", f"{gone.pid} 1\n", f"{stat.pid} 1\n"):
        note.write_text(text)  # the last: the number is another process's by now
        refuse_left(tmp_path)
    note.write_text(f"{stat.pid} {stat.start_ticks}\n")
    with pytest.raises(StartError, match=f"its {name}( service)? running"):
        refuse_left(tmp_path)


@pytest.mark.parametrize("flags", [["--port", "many"], ["--policy", "luck"], ["--workers", "0"]])
def test_up_refuses_bad_values(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", *flags, "--run-dir", str(tmp_path)]) == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "x", "1" * 9, "²"])
def test_a_manager_port_is_a_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["manager", f"--port={port}"])
    assert "is not a port" in capsys.readouterr().err


def given(**values: object) -> dict[str, object]:
    return {"config": None, **values}


def test_flag_over_environment_over_file(good: str) -> None:
    environ = {"DOHERTY_PORT": "9200", "DOHERTY_ADMIN_PORT": "9201", "DOHERTY_MANAGER_PORT": "9202"}
    plan = plan_of(given(config=good, admin_port="9301", run_dir="/r"), environ)
    assert (plan.proxy.port, plan.proxy.admin_port) == (9200, 9301)
    assert (plan.manager.port, plan.manager.run_dir) == (9202, "/r")
    assert plan_of(given(config=good), {}).proxy.port == 9100
    config, path = manager_config_of(given(manager_port=9400), {"DOHERTY_CONFIG": good})
    assert (config.manager.port, path) == (9400, good)


def test_traces_that_could_not_be_sent_stop_a_start_before_it_begins(
    good: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracing, "missing_library", lambda: "install the exporter")
    environ = {"DOHERTY_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"}
    with pytest.raises(ConfigError, match="install the exporter"):
        plan_of(given(config=good), environ)
    plan_of(given(config=good), environ | {"OTEL_SDK_DISABLED": "true"})
    plan_of(given(config=good), {})
    traced = Path(good).with_name("traced.yaml")
    traced.write_text(GOOD.replace("{port: 9100,", "{port: 9100, enable_trace: true,"))
    assert main(["check", str(traced)]) == 0
    assert capsys.readouterr().err.endswith(f"{traced}: warning: install the exporter\n")


def test_cards_of_the_manager_by_environment_and_file(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("manager:\n  gpus: 0-3\n  warm_page_cache: false\n")
    settings = manager_config_of(given(config=str(path)), {})[0].manager
    assert (settings.gpus, settings.warm_page_cache) == ("0-3", False)
    environ = {"DOHERTY_GPUS": "1,GPU-8932f937", "DOHERTY_WARM_PAGE_CACHE": "true"}
    settings = manager_config_of(given(config=str(path)), environ)[0].manager
    assert (settings.gpus, settings.warm_page_cache) == ("1,GPU-8932f937", True)
    path.write_text("manager:\n  gpus: 7\n")
    assert manager_config_of(given(config=str(path)), {})[0].manager.gpus == 7
    path.write_text("manager: {gpus: [0, 2-3, GPU-8932f937]}\n")
    settings = manager_config_of(given(config=str(path)), {})[0].manager
    assert settings.cards == "0,2-3,GPU-8932f937"


@pytest.mark.parametrize("value", ["a", "all", "", "2-0", "0,5-4", "0,,1", "none,1"])
def test_cards_that_are_none_are_refused_by_whoever_names_them(value: str, tmp_path: Path) -> None:
    problem = rf"gpus: '{value}' is none of auto, none, or a list such as 0,2-3"
    with pytest.raises(ConfigError, match=f"^DOHERTY_GPUS: {problem}"):
        manager_config_of(given(), {"DOHERTY_GPUS": value})
    path = tmp_path / "f.yaml"
    path.write_text(f"manager:\n  gpus: '{value}'\n")
    with pytest.raises(ConfigError, match=f"f.yaml:2: manager: {problem}"):
        manager_config_of(given(config=str(path)), {})


def test_settings_of_the_manager_are_refused_by_the_name_they_came_by() -> None:
    with pytest.raises(ConfigError, match=r"^DOHERTY_MANAGER_PORT: Expected `int`"):
        manager_config_of(given(), {"DOHERTY_MANAGER_PORT": "http"})
    with pytest.raises(ConfigError, match=r"^DOHERTY_WARM_PAGE_CACHE: Expected `bool`"):
        manager_config_of(given(), {"DOHERTY_WARM_PAGE_CACHE": "perhaps"})


def test_without_a_file_there_is_a_demo() -> None:
    plan = plan_of(given(), {})
    assert plan.config_path is None
    assert plan.config.models[0].pools[0].replicas == 2


def test_up_without_replicas_would_wait_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("models: [{name: m, pools: [{engine: vllm, replicas: 0}]}]")
    with pytest.raises(ConfigError, match="no replica is configured"):
        plan_of(given(config=str(path)), {})


@pytest.mark.parametrize("name", ["manager_url", "worker_urls"])
def test_up_has_its_own_manager(name: str) -> None:
    with pytest.raises(ConfigError, match="doherty proxy"):
        plan_of(given(**{name: "http://127.0.0.1:1"}), {})


def test_keys_go_by_the_environment_and_not_by_the_command_line(good: str) -> None:
    plan = plan_of(given(config=good, api_key="hush-hush", policy="round_robin"), {})
    commands = services(plan, {"HOME": "/h"})
    manager, offline, proxy = commands.manager, commands.offline, commands.proxy
    assert offline is not None
    assert "hush-hush" not in " ".join((*manager.argv, *offline.argv, *proxy.argv))
    assert proxy.env["DOHERTY_API_KEY"] == offline.env["DOHERTY_API_KEY"] == "hush-hush"
    assert "--policy=round_robin" in proxy.argv
    assert proxy.argv[5:7] == ("--manager-url", "http://127.0.0.1:9102")
    assert f"--access-log={plan.manager.run_dir}/logs/access.log" in proxy.argv
    assert manager.argv[1:6] == ("-m", "backends.cli", "manager", "--config", good)


def test_jobs_are_served_between_manager_and_proxy(good: str) -> None:
    plan = with_ports(plan_of(given(config=good, port=0, admin_port=0, manager_port=0), {}))
    commands = services(plan, {})
    assert commands.offline is not None
    argv = commands.offline.argv
    assert argv[1:5] == ("-m", "backends.cli", "offline", good)
    assert f"--port={plan.offline.port}" in argv
    assert f"--manager-url={plan.manager_url}" in argv
    assert f"--proxy-url={plan.url}" in argv
    assert f"--offline-url={plan.offline_url}" in commands.proxy.argv
    assert commands.manager.env["DOHERTY_OFFLINE_PORT"] == str(plan.offline.port)
    assert plan.offline.port not in {0, 8003}  # whoever takes any port means it for all
    assert f"{plan.url}/v1/batches" in banner(plan)


@pytest.mark.parametrize(
    "changes", [{"offline": False}, {"offline_url": "http://10.0.0.9:8003", "offline": True}]
)
def test_no_service_of_jobs_where_none_is_wanted_or_another_is_named(
    good: str, changes: dict[str, object]
) -> None:
    plan = plan_of(given(config=good, **changes), {})
    commands = services(plan, {})
    assert commands.offline is None
    assert "DOHERTY_OFFLINE_PORT" not in commands.manager.env
    assert "/v1/batches" not in banner(plan)
    told = [flag for flag in commands.proxy.argv if flag.startswith("--offline-url")]
    assert told == [f"--offline-url={url}" for url in [changes.get("offline_url")] if url]


def test_where_jobs_are_kept_and_how_workers_reach_them_may_come_from_the_environment(
    good: str,
) -> None:
    environ = {
        "DOHERTY_STORE": "postgresql://u:p@h/d",
        "DOHERTY_OFFLINE_HOST": "0.0.0.0",
        "DOHERTY_OFFLINE_PORT": "8103",
        "DOHERTY_WORK_KEY": "work-key",
    }
    for config, _ in (
        offline_config_of(given(config=good), environ),
        manager_config_of(given(config=good), environ),
    ):
        offline = config.offline
        assert (offline.store, offline.port) == ("postgresql://u:p@h/d", 8103)
        assert (offline.host, offline.work_key) == ("0.0.0.0", "work-key")
    del environ["DOHERTY_WORK_KEY"]
    for settle in (offline_config_of, manager_config_of, plan_of):
        with pytest.raises(ConfigError, match="work_key"):
            settle(given(config=good), environ)
    assert plan_of(given(config=good, offline=False), environ).offline.enabled is False


def test_check_hides_the_keys_of_jobs_and_refuses_a_desk_that_all_can_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    keys = "store: 'postgresql://u:pass-word@h/d', work_url: 'http://u:pass-word@h:1'"
    path.write_text(f"offline: {{host: 0.0.0.0, work_key: hush-hush, {keys}}}")
    assert main(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "hush-hush" not in shown
    assert "pass-word" not in shown
    path.write_text("offline: {store: 'mysql://u:pass-word@h/d'}")
    assert main(["check", str(path)]) == 2
    said = capsys.readouterr().err
    assert "mysql://" in said
    assert "pass-word" not in said
    path.write_text("offline: {host: 0.0.0.0}")
    assert main(["check", str(path)]) == 2
    assert "offline.work_key" in capsys.readouterr().err


def test_flags_are_written_so_that_they_are_read_again() -> None:
    assert flags_of({"a_b": True, "c": False, "d": ("x", "y"), "e": 1, "f": "-"}) == (
        *("--a-b", "--no-c", "--d", "x", "y", "--e=1", "--f=-"),
    )


def test_the_banner_tells_which_models_nobody_serves(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    pools = "pools: [{engine: simulator}]"
    path.write_text("models:\n" + "".join(f"  - {{name: {m}, {pools}}}\n" for m in "mvw"))
    plan = plan_of(given(config=str(path)), {})
    ready, backoff = ReplicaState.READY, ReplicaState.BACKOFF
    replicas = [
        ReplicaRecord(replica_id=name, url="http://h:1", models=models, state=state, asleep=asleep)
        for name, models, state, asleep in (
            ("m-0", ("m",), backoff, False),
            ("v-0", ("v",), backoff, False),
            ("v-1", ("v", "v-lora"), ready, False),
            ("w-0", ("w",), ready, True),
        )
    ]
    down = models_down(plan.config, replicas)
    assert down == ("m", "w")
    text = banner(plan, down)
    assert "Ready, without m, w: http://127.0.0.1:8000/v1\n" in text
    assert 'model="v"' in text


def test_the_banner_can_be_pasted(good: str) -> None:
    open_plan = plan_of(given(), {})
    text = banner(open_plan)
    assert "Ready: http://127.0.0.1:8000/v1" in text
    command = text.split("curl")[1].split("\n\n")[0]
    assert '"stream": true' in command
    assert json.loads(command.split("-d '")[1].rsplit("'", 1)[0])["model"] == "demo"
    python = text.split("\n\n")[2]
    assert "OpenAI(" in python
    compile(python, "snippet", "exec")
    keyed = banner(plan_of(given(config=good), {}))
    assert "hush-hush" not in keyed
    assert "Bearer $DOHERTY_API_KEY" in keyed
    assert 'os.environ["DOHERTY_API_KEY"]' in keyed


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000")]
)
def test_an_address_for_everybody_is_shown_as_one_that_can_be_used(host: str, url: str) -> None:
    assert plan_of(given(host=host), {}).url == url


def test_progress_tells_what_matters() -> None:
    def record(state: ReplicaState, restarts: int = 0) -> ReplicaRecord:
        return ReplicaRecord(
            replica_id="m-0", url="http://h:1", state=state, reason="why", restarts=restarts
        )

    assert describe(record(ReplicaState.READY)) == "  m-0 is ready (unknown, http://h:1)"
    assert "restart 2" in describe(record(ReplicaState.READY, 2))
    assert describe(record(ReplicaState.BACKOFF)) == "  m-0 waits to start again: why"
    assert describe(record(ReplicaState.STARTING)) == "  m-0 is starting"
    assert describe(record(ReplicaState.STOPPING)) == ""
    asleep = msgspec.structs.replace(record(ReplicaState.READY), asleep=True)
    assert describe(asleep) == "  m-0: why"
    known = msgspec.structs.replace(record(ReplicaState.READY), engine_version="0.26.0")
    assert describe(known) == "  m-0 is ready (unknown 0.26.0, http://h:1)"


def test_redaction() -> None:
    args = ["--api-key", "a", "b", "--port", "1", "--hf-token=c", "--tokenizer", "d", "e"]
    assert redacted_args(args) == [
        *("--api-key", HIDDEN, HIDDEN, "--port", "1", f"--hf-token={HIDDEN}"),
        *("--tokenizer", "d", "e"),
    ]
    config = parse_config(GOOD.replace("port: 9100", "worker_urls: ['http://u:p@h:1']"), "test")
    assert "hush-hush" not in json.dumps(redacted(config))
    assert redacted(config)["proxy"]["worker_urls"] == [f"http://{HIDDEN}@h:1"]
    access = (
        "jwt: {issuer: 'https://i', audience: a, jwks_url: 'https://u:hush-hush@i/keys'}\n"
        "remote_regions: [{region: us, url: 'https://u:hush-hush@us', peer: 'us:1'}]\n"
    )
    own = parse_config("region: eu\nproxy: {region: eu-2}\n", "test")
    of_file = parse_config("region: eu\n", "test")
    assert [redacted(c)["proxy"]["region"] for c in (own, of_file)] == ["eu-2", "eu"]
    assert "access" not in redacted(config)["proxy"]  # it is what the rest of the file says
    assert "hush-hush" not in json.dumps(redacted(parse_config(access, "test")))


def test_what_ray_is_told_is_shown_without_its_secrets() -> None:
    ray = "{env: {HF_TOKEN: hush-hush, HF_HOME: /m}, runtime_env: {env_vars: {A: hush-hush}}}"
    shown = redacted(parse_config(f"manager: {{provider: ray, ray: {ray}}}", "f"))
    assert "hush-hush" not in json.dumps(shown)
    assert shown["manager"]["ray"]["env"]["HF_HOME"] == "/m"


FLEET = FleetSnapshot(
    epoch="e",
    version=1,
    replicas=(
        ReplicaRecord(
            replica_id="m-0",
            url="http://127.0.0.1:1",
            engine="vllm",
            engine_version="0.26.0",
            gpus=("0", "1"),
            load=LoadSample(at_s=1.0, running=3, waiting=12, kv_used_ratio=0.456),
        ),
        ReplicaRecord(
            replica_id="long-name-1",
            url="http://127.0.0.1:22",
            state=ReplicaState.BACKOFF,
            restarts=7,
            reason="exited with status 1",
        ),
        ReplicaRecord(
            replica_id="m-1",
            url="http://127.0.0.1:3",
            engine="sglang",
            asleep=True,
            reason="asleep at level 1, after 0.36 s",
        ),
    ),
)


def test_status_table() -> None:
    assert table(FLEET).splitlines() == [
        "ID           STATE    ENGINE       URL                  GPUS  RUNNING  WAITING  KV   "
        "RESTARTS  REASON",
        "m-0          ready    vllm 0.26.0  http://127.0.0.1:1   0,1   3        12       46%  0",
        "long-name-1  backoff  unknown      http://127.0.0.1:22  -     -        -        -    "
        "7         exited with status 1",
        "m-1          asleep   sglang       http://127.0.0.1:3   -     -        -        -    "
        "0         asleep at level 1, after 0.36 s",
    ]
    assert table(FleetSnapshot(epoch="e", version=1)) == "no replicas"


@pytest.fixture
def answering() -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """Serve whatever the test puts into the list."""
    answers: list[tuple[int, bytes]] = [(200, b"")]

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        @override
        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", answers
        server.shutdown()
        thread.join()


def test_status(
    answering: tuple[str, list[tuple[int, bytes]]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, answers = answering
    answers[0] = (200, encode_snapshot(FLEET))
    assert main(["status", "--manager-url", url]) == 0
    assert "long-name-1" in capsys.readouterr().out


NO_FLEETS = [
    (200, b"<html>", "something else than a fleet"),
    (404, b"", "answered 404: is that a manager?"),
]


@pytest.mark.parametrize(("code", "body", "message"), NO_FLEETS)
def test_status_of_something_else(
    answering: tuple[str, list[tuple[int, bytes]]],
    code: int,
    body: bytes,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, answers = answering
    answers[0] = (code, body)
    assert main(["status", "--manager-url", url]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://x", "127.0.0.1:8002"])
@pytest.mark.parametrize("command", [["status"], ["sleep", "m-0"], ["wake", "m-0"]])
def test_status_of_nothing(
    command: list[str], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--manager-url", url]) == 1
    assert url in capsys.readouterr().err


def test_a_level_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sleep", "m-0", "--level", "3"])
    assert ended.value.code == 2
    assert "invalid choice: 3" in capsys.readouterr().err
