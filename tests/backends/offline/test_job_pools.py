"""Pools of engine workers: what the configuration may say of them, and how one is started."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from backends.adapters import Way, way
from backends.checking import check_engines
from backends.engines import ENGINES
from backends.engines.base import FlagError, Ports, launch_hash
from backends.engines.probe import program_of
from backends.engines.release import UNKNOWN_RELEASE
from backends.loras import of_start
from backends.spec import PoolSpec, pool_specs
from backends.status import table
from backends.up_plan import Plan
from backends.up_words import banner, models_down, takes_requests
from proxy.config import ConfigError, parse_config
from proxy.contract import FleetSnapshot, ReplicaRecord

ROOT = Path(__file__).parents[3]


def pool_of(pool: str, more: str = "") -> PoolSpec:
    text = f"{more}\nmodels: [{{name: m, pools: [{{serves: jobs, {pool}}}]}}]"
    return pool_specs(parse_config(text, "test"))[0]


def argv_of(pool: PoolSpec) -> tuple[str, ...]:
    engine = ENGINES[pool.first.engine]
    return engine.command(pool.first, Ports(4000, internal=5000), UNKNOWN_RELEASE).argv


def test_a_worker_is_told_where_the_desk_is_and_what_its_engine_is_told() -> None:
    pool = pool_of(
        "engine: vllm, model_path: /w/m, args: [--max-model-len, '4096']",
        "offline: {port: 8103, work_key: secret-key}",
    )
    assert argv_of(pool) == (
        *("vllm", "--engine", "vllm", "--model", "m", "--model-path", "/w/m"),
        *("--desk", "http://127.0.0.1:8103", "--worker-id", "m-0"),
        *("--chunk-lines", "2000"),
        *("--port", "4000", "--host", "127.0.0.1", "--", "--max-model-len", "4096"),
    )
    hashes = {launch_hash(ENGINES["vllm-jobs"], pool.replica(number)) for number in range(3)}
    assert len(hashes) == 1, "another number is no other command"
    assert pool.first.env == {"DOHERTY_WORK_KEY": "secret-key"}
    assert pool.first.work_class == "offline"
    simulated = argv_of(pool_of("engine: simulator", "offline: {work_url: 'http://desk:1/'}"))
    assert simulated[:3] == (sys.executable, "-m", "backends.offline.worker")
    assert "http://desk:1" in simulated


def test_adapters_are_loaded_from_the_start() -> None:
    """None comes or goes while a worker runs, so that a change of them is a new start."""
    argv = argv_of(pool_of("engine: vllm, adapters: {sql: /l/sql}, args: [--max-lora-rank, '64']"))
    own, engines = argv[: argv.index("--")], argv[argv.index("--") :]
    assert "--lora-modules" not in own
    assert engines[engines.index("--lora-modules") + 1] == "sql=/l/sql"
    assert engines[-2:] == ("--max-lora-rank", "64"), "the user's own come last"
    pool = pool_of("engine: simulator, adapters: {sql: /l/sql}")
    assert argv_of(pool)[-2:] == ("--lora-modules", "sql")
    loaded = of_start(ENGINES[pool.first.engine], pool.first)
    assert way(loaded, {}) is Way.START


def test_it_runs_in_the_python_of_its_engine_and_finds_us_there(tmp_path: Path) -> None:
    python = tmp_path / "python3.12"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    script = tmp_path / "vllm"
    script.write_text(f"#!{python}\n")
    script.chmod(0o755)
    spec = pool_of("engine: vllm").first
    engine = ENGINES[spec.engine]
    for environ in ({"PATH": str(tmp_path)}, {"DOHERTY_ENGINE_PYTHON": str(python)}):
        pool = pool_of("engine: vllm", "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            program = program_of(engine, pool.first, environ)
        launch = engine.command(spec, Ports(4000), UNKNOWN_RELEASE)
        argv = program.argv(launch.argv)
        assert argv[:5] == (str(python), "-m", "backends.offline.worker", "--engine", "vllm")
        assert program.package == "vllm", "so that its release can be asked for"
        assert launch.python_path == str(ROOT)


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ("engine: sglang", "sglang has no worker here"),
        ("engine: vllm, target_inputs: 8", "target_inputs is for serves: requests"),
        ("engine: vllm, sleep: true", "sleep is for serves: requests"),
        ("engine: vllm, autoscale: {max: 2, buffer: 1}", "no line of a job hurries"),
    ],
)
def test_what_means_nothing_to_workers_is_refused(pool: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pool_of(pool)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("[--api-key, k]", "no HTTP server"),
        ("[--data-parallel-size, '2']", "as many replicas"),
        ("[--max-num-sequences, '2']", "did you mean --max-num-seqs"),
    ],
)
def test_arguments_that_a_worker_cannot_take_are_told_before_a_start(args: str, words: str) -> None:
    text = f"models: [{{name: m, pools: [{{serves: jobs, engine: vllm, args: {args}}}]}}]"
    config = parse_config(text, "test")
    told: list[str] = []
    try:
        told += check_engines(config, "test", {"PATH": ""})
    except ConfigError as error:
        told.append(str(error))
    assert any(words in each for each in told)


def test_workers_scale_without_a_target_rest_nowhere_and_have_names_of_their_own() -> None:
    text = """
    models:
      - name: m
        pools:
          - {engine: vllm, replicas: 1}
          - {engine: vllm, serves: jobs, autoscale: {max: 3}, gpu_price_per_hour: 2.5}
    """
    requests, jobs = pool_specs(parse_config(text, "test"))
    assert (requests.pool_id, jobs.pool_id) == ("m", "m-vllm-jobs")
    assert jobs.autoscale is not None
    assert jobs.autoscale.rungs == ("cold",)
    assert jobs.first.gpu_price_per_hour == 2.5
    with pytest.raises(FlagError, match="does not sleep"):
        ENGINES[jobs.first.engine].sleep_calls(jobs.first, 1)


def test_the_load_of_a_worker_is_read() -> None:
    spec = pool_of("engine: simulator").first
    page = (
        b"doherty_worker_lines_running 200\ndoherty_worker_lines_waiting 1800\n"
        b"doherty_worker_kv_cache_usage_ratio 0.5\ndoherty_worker_completion_tokens_total 9000\n"
    )
    load = ENGINES[spec.engine].read_load([page], 7.0)
    assert load is not None
    assert (load.running, load.waiting, load.kv_used_ratio) == (200, 1800, 0.5)
    assert load.generation_tokens_total == 9000
    assert ENGINES[spec.engine].read_load([b""], 7.0) is None


def test_a_budget_needs_prices_and_status_shows_workers() -> None:
    with pytest.raises(ConfigError, match="needs the gpu_price_per_hour of each pool"):
        pool_of("engine: vllm", "offline: {price_per_hour_max: 9}")
    assert pool_of("engine: vllm, gpu_price_per_hour: 3", "offline: {price_per_hour_max: 9}")
    worker = ReplicaRecord(replica_id="m-0", url="http://127.0.0.1:1", engine="vllm-jobs")
    shown = table(FleetSnapshot(epoch="e", version=1, workers=(worker,)))
    assert "m-0" in shown
    assert "vllm-jobs" in shown


def test_up_offers_no_request_for_a_model_that_only_workers_have() -> None:
    text = """
    models:
      - {name: batch, pools: [{engine: simulator, serves: jobs, autoscale: {max: 1}}]}
      - {name: chat, pools: [{engine: simulator}]}
    """
    config = parse_config(text, "test")
    assert models_down(config, ()) == ("chat",), "nobody waits for a replica of the other"
    plan = Plan(
        config_path=None,
        config=config,
        proxy=config.proxy,
        proxy_flags={},
        manager=config.manager,
        offline=config.offline,
    )
    assert '"model": "chat"' in banner(plan)
    only = parse_config(text.partition("- {name: chat")[0], "test")
    assert takes_requests(config)
    assert not takes_requests(only)
    pasted = banner(msgspec.structs.replace(plan, config=only))
    assert "curl" not in pasted
    python = pasted[pasted.index("from openai") : pasted.index("  admin")]
    compile(python, "banner", "exec")
    assert "client.batches.create(" in python


def test_workers_without_a_desk_are_refused() -> None:
    with pytest.raises(ConfigError, match="get their lines from the offline service"):
        pool_of("engine: vllm", "offline: {enabled: false}")
    pool = pool_of("engine: vllm", "offline: {enabled: false, work_url: 'http://desk:8003'}")
    assert pool.first.desk_url == "http://desk:8003"
