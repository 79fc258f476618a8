"""What the manager knows about each engine: commands, readiness, load."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.engines import ENGINES, features
from backends.engines.base import (
    PRIORITIES,
    EngineMissingError,
    Launch,
    Ports,
    PortsNeeded,
    kv_endpoints,
    launch_hash,
    merged,
    option,
    resolve_program,
)
from backends.engines.flags import available, flag_table
from backends.engines.release import UNKNOWN_RELEASE, Release
from backends.simulator.flags import parse_flags
from backends.spec import ReplicaSpec
from proxy.contract.exposition import read_samples

GOLDEN = Path(__file__).parent.parent / "golden"


def spec(engine: str, *args: str, **fields: object) -> ReplicaSpec:
    base = ReplicaSpec(replica_id="m-0", model="m", pool="m", engine=engine, args=args)
    return msgspec.structs.replace(base, **fields)


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


COMMANDS = [
    ("vllm", ("vllm", "serve", "/models/x")),
    ("sglang", ("sglang", "serve", "--model-path", "/models/x")),
    ("simulator", (sys.executable, "-m", "backends.simulator")),
]


@pytest.mark.parametrize(("name", "head"), COMMANDS)
def test_command(name: str, head: tuple[str, ...]) -> None:
    wanted = spec(name, "--port", "1", "--extra", model_path="/models/x")
    argv = ENGINES[name].command(wanted, Ports(20_001), UNKNOWN_RELEASE).argv
    assert argv[: len(head)] == head
    assert argv[-3:] == ("--port", "1", "--extra"), "the user's arguments win by coming last"
    assert ("--host", "127.0.0.1") in list(itertools.pairwise(argv))
    assert ("--port", "20001") in list(itertools.pairwise(argv))


def test_without_a_path_the_model_name_is_what_is_loaded() -> None:
    assert ENGINES["vllm"].command(spec("vllm"), Ports(1), UNKNOWN_RELEASE).argv[2] == "m"
    assert "m" in ENGINES["sglang"].command(spec("sglang"), Ports(1), UNKNOWN_RELEASE).argv


@pytest.mark.parametrize(
    ("name", "args", "ready", "load", "abort"),
    [
        ("vllm", (), ("/health",), ("/metrics",), None),
        ("sglang", (), ("/ready", "/health"), ("/metrics", "/v1/loads"), "/abort_request"),
        ("simulator", (), ("/health",), ("/metrics",), None),
        (
            "simulator",
            ("--dialect", "sglang"),
            ("/ready", "/health"),
            ("/metrics", "/v1/loads"),
            "/abort_request",
        ),
        ("simulator", ("--dialect=vllm",), ("/health",), ("/metrics",), None),
    ],
)
def test_paths(
    name: str, args: tuple[str, ...], ready: tuple[str, ...], load: tuple[str, ...], abort: str
) -> None:
    engine, wanted = ENGINES[name], spec(name, *args)
    assert engine.ready_paths(wanted) == ready
    assert engine.load_paths(wanted) == load
    assert engine.facts(wanted).abort_path == abort


@pytest.mark.parametrize("name", ["vllm", "simulator"])
def test_load_of_vllm(name: str) -> None:
    load = ENGINES[name].read_load([golden("vllm-0.26.0-metrics.txt")], 5.0)
    assert load is not None
    assert (load.at_s, load.running, load.waiting, load.kv_used_ratio) == (5.0, 0, 0, 0.0)
    assert load.kv_capacity_tokens == 21_004 * 16
    assert load.prompt_tokens_total == 1_224_485
    assert load.cached_tokens_total == 676_880
    assert load.generation_tokens_total == 65_291


@pytest.mark.parametrize("name", ["sglang", "simulator"])
def test_load_of_sglang(name: str) -> None:
    load = ENGINES[name].read_load([golden("sglang-0.5.17-metrics.txt"), b""], 5.0)
    assert load is not None
    assert load.kv_capacity_tokens == 343_968
    assert load.prompt_tokens_total == 92 + 1_104_189, "streaming and not"
    assert load.cached_tokens_total == 596_944


def test_sglang_loads_win_over_its_lagging_gauges() -> None:
    text = golden("sglang-0.5.17-metrics.txt")
    loads = golden("sglang-0.5.17-loads.json")
    busy = loads.replace(b'"num_running_reqs": 0', b'"num_running_reqs": 7')
    assert busy != loads
    load = ENGINES["sglang"].read_load([text, busy], 5.0)
    assert load is not None
    assert (load.running, load.waiting, load.cached_tokens_total) == (7, 0, 596_944)
    alone = ENGINES["sglang"].read_load([b"", busy], 5.0)
    assert alone is not None
    assert (alone.running, alone.kv_capacity_tokens) == (7, 343_968)


RANKS = [
    (
        "vllm sums its data-parallel ranks, and the fullest cache counts",
        "vllm",
        'vllm:num_requests_running{engine="0"} 2\nvllm:num_requests_running{engine="1"} 3\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.1\nvllm:kv_cache_usage_perc{engine="1"} 0.9\n',
        (5, 0.9),
    ),
    (
        "sglang repeats figures per tensor-parallel rank, and splits them by priority",
        "sglang",
        'sglang:num_running_reqs{tp_rank="0",priority=""} 4\n'
        'sglang:num_running_reqs{tp_rank="1",priority=""} 4\n'
        'sglang:num_running_reqs{tp_rank="0",priority="1"} 3\n'
        'sglang:token_usage{tp_rank="0"} 0.25\n',
        (4, 0.25),
    ),
    (
        "a value that is no number is no value",
        "vllm",
        "vllm:num_requests_running 1\nvllm:kv_cache_usage_perc NaN\n",
        (1, 0.0),
    ),
    (
        "ratios and counts are held to what they can be",
        "vllm",
        "vllm:num_requests_running -3\nvllm:kv_cache_usage_perc 7.5\n",
        (0, 1.0),
    ),
    ("the old name of the usage", "vllm",
     "vllm:num_requests_running 1\nvllm:gpu_cache_usage_perc 0.5\n", (1, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "load"), [c[1:] for c in RANKS], ids=[c[0] for c in RANKS]
)
def test_folding(name: str, text: str, load: tuple[int, float]) -> None:
    sample = ENGINES[name].read_load([text.encode(), b""], 1.0)
    assert sample is not None
    assert (sample.running, sample.kv_used_ratio) == load


@pytest.mark.parametrize(
    "text",
    [b"", b"\n\n", b"<html>no</html>", b"vllm:num_requests_running", b"vllm:num_requests_running{",
     b"vllm:num_requests_running{} x", b"vllm:kv_cache_usage_perc 0.5", b"\xff\xfe\x00"],
)  # fmt: skip
def test_what_says_nothing_is_no_reading(text: bytes) -> None:
    for engine in ENGINES.values():
        assert engine.read_load([text, text], 1.0) is None


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_no_page_breaks_the_reader(page: bytes, label: bytes) -> None:
    page += b'\nvllm:num_requests_running{a="' + label + b'"} 2\n'
    for engine in ENGINES.values():
        engine.read_load([page, page], 1.0)


def test_labels_are_unescaped() -> None:
    text = rb'x{a="b\"c\\d\ne",f="g}h"} 1.5 1700000000'
    assert read_samples(text, ["x"]) == {"x": [({"a": 'b"c\\d\ne', "f": "g}h"}, 1.5)]}


OPTIONS = [
    (("--dialect", "sglang"), "sglang"),
    (("--dialect=sglang",), "sglang"),
    (("--dialect", "vllm", "--dialect=sglang"), "sglang"),
    (("--dialects", "x"), None),
    (("--dialect",), None),
]


@pytest.mark.parametrize(("args", "value"), OPTIONS)
def test_option(args: tuple[str, ...], value: str | None) -> None:
    assert option(args, "--dialect") == value


def test_a_missing_program_names_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    checkout = Path(__file__).parents[2]
    command = re.escape(f"{sys.executable} -m pip install -e '{checkout}[vllm]'")
    with pytest.raises(EngineMissingError, match=f"; install it with: {command}, or"):
        resolve_program(("no-such-engine", "serve"), "vllm")
    with pytest.raises(EngineMissingError, match="was not found"):
        resolve_program((str(tmp_path / "gone"),), "")
    program = tmp_path / "engine-of-mine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert resolve_program(("engine-of-mine", "x"), "") == (str(program), "x")


def test_the_hash_follows_what_needs_a_restart() -> None:
    engine = ENGINES["vllm"]
    base = launch_hash(engine, spec("vllm"))
    assert base == launch_hash(engine, spec("vllm", target_inputs=3, replica_id="m-1"))
    assert base == launch_hash(engine, spec("vllm", adapters={"a": "/a"})), "they come by calls"
    assert base != launch_hash(engine, spec("vllm", "--x"))
    assert base != launch_hash(engine, spec("vllm", env={"A": "1"}))
    assert base != launch_hash(engine, spec("vllm", model_path="/other"))


def test_an_engine_inherits_everything_but_our_own_settings() -> None:
    environ = {"PATH": "/bin", "A": "outer", "DOHERTY_API_KEY": "secret"}
    launch = Launch(("x",), {"A": "engine", "B": "engine"})
    env = merged(environ, launch, spec("vllm", env={"B": "user"}))
    assert env == {"PATH": "/bin", "A": "engine", "B": "user"}


def words(name: str, ports: Ports, release: Release = UNKNOWN_RELEASE, **fields: object) -> str:
    """Return a command as one line."""
    wanted = spec(name, *fields.pop("args", ()), **fields)  # type: ignore[misc]
    return " ".join(ENGINES[name].command(wanted, ports, release).argv)


LEASED = Ports(20_001, 20_002, 20_004, 20_006)
LOOPBACK_ONLY = '"endpoint":"tcp://[::ffff:127.0.0.1]:20002"'


@pytest.mark.parametrize("name", ["sglang", "simulator", "vllm"])
def test_events_are_published_on_leased_ports(name: str) -> None:
    line = words(name, LEASED)
    assert LOOPBACK_ONLY in line
    assert '"replay_endpoint":"tcp://127.0.0.1:20004"' in line
    source = ENGINES[name].kv_source(spec(name), LEASED, UNKNOWN_RELEASE)
    assert source == ("tcp://127.0.0.1:20002", "tcp://127.0.0.1:20004", "kv")
    assert ENGINES[name].kv_source(spec(name), Ports(20_001), UNKNOWN_RELEASE) is None
    assert "kv-events" not in words(name, Ports(20_001))


def test_the_event_endpoint_is_bound_on_loopback_alone() -> None:
    """What engines take for a wildcard is 127.0.0.1 to ZeroMQ: nobody outside hears a token."""
    endpoint = kv_endpoints(Ports(0, kv_events=1))["endpoint"]
    assert "::" in endpoint
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.bind(endpoint.rpartition(":")[0] + ":0")
        bound = publisher.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        assert bound.startswith(b"tcp://127.0.0.1:")


NO_EVENTS = [
    ("vllm", ("--kv-events-config", "{}")),
    ("vllm", ("--no-enable-prefix-caching",)),
    ("vllm", ("--data-parallel-rank", "1")),
    ("vllm", ("--kv_events_config", "{}")),
    ("vllm", ("--kv-events-config.topic", "x")),
    ("sglang", ("--dp-size", "2")),
    ("sglang", ("--pp-size", "2")),
    ("sglang", ("--kv-events-config={}",)),
    ("sglang", ("--disable-radix-cache",)),
    ("simulator", ("--kv-events-port", "0")),
    ("simulator", ("--kv-events-config", "{}")),
]


@pytest.mark.parametrize(("name", "args"), NO_EVENTS)
def test_events_of_ones_own_are_left_alone(name: str, args: tuple[str, ...]) -> None:
    engine, wanted = ENGINES[name], spec(name, *args)
    assert engine.ports_needed(wanted, UNKNOWN_RELEASE).kv_events == 0
    assert engine.kv_source(wanted, LEASED, UNKNOWN_RELEASE) is None


PORTS = [
    ("vllm", (), PortsNeeded(1, 1, 8)),
    ("vllm", ("-dp", "4"), PortsNeeded(4, 4, 8)),
    ("vllm", ("--data-parallel-size=4", "--data-parallel-size-local", "2"), PortsNeeded(2, 2, 8)),
    ("sglang", (), PortsNeeded(1, 1, 1)),
    ("sglang", ("--dp-size", "2", "--enable-dp-attention"), PortsNeeded(2, 2, 1)),
    ("sglang", ("--attn-dp-size", "4"), PortsNeeded(4, 4, 1)),
    ("sglang", ("--nccl-port", "5"), PortsNeeded(1, 1, 0)),
    ("simulator", (), PortsNeeded(1, 1, 0)),
    ("simulator", ("--dp-size", "3"), PortsNeeded(3, 3, 0)),
]


@pytest.mark.parametrize(("name", "args", "needed"), PORTS)
def test_ports_needed(name: str, args: tuple[str, ...], needed: PortsNeeded) -> None:
    assert ENGINES[name].ports_needed(spec(name, *args), UNKNOWN_RELEASE) == needed


@pytest.mark.parametrize(("release", "events"), [(Release(0, 5, 10), 0), (Release(0, 5, 15), 2)])
def test_ranks_that_would_bind_one_port_tell_no_events(release: Release, events: int) -> None:
    """Before 0.5.15 every worker of plain data parallelism bound the first port, and one lived."""
    engine, wanted = ENGINES["sglang"], spec("sglang", "--dp-size", "2")
    assert engine.ports_needed(wanted, release).kv_events == events
    line = " ".join(engine.command(wanted, LEASED, release).argv)
    assert ("--kv-events-config" in line) == bool(events)


GPUS = [
    ("vllm", (), 1),
    ("vllm", ("-tp", "4"), 4),
    ("vllm", ("--tensor-parallel-size=2", "-pp", "2", "-dp", "2"), 8),
    ("vllm", ("-tp", "2", "-pcp", "2"), 4),
    ("vllm", ("-tp", "16", "--nnodes", "2"), 8),
    ("vllm", ("-dp", "8", "-dpl", "4"), 4),
    ("vllm", ("-dpl", "4", "-dp", "8"), 4),
    ("vllm", ("-tp", "2", "--nnodes", "0"), 2),
    ("vllm", ("-tp", "none"), 1),
    ("vllm", ("--tensor_parallel_size", "2", "--tensor-parallel-size=4"), 4),
    ("sglang", (), 1),
    ("sglang", ("--tp-size", "4"), 4),
    ("sglang", ("--tp", "2", "--pp-size", "2"), 4),
    ("sglang", ("--tp-size", "2", "--dp-size", "2"), 4),
    ("sglang", ("--tp-size", "8", "--dp-size", "8", "--enable-dp-attention"), 8),
    ("sglang", ("--tp-size", "8", "--attn-dp-size", "4"), 8),
    ("sglang", ("--tp-size", "16", "--nnodes", "2"), 8),
    ("sglang", ("--tp-size", "2", "--nnodes", "0"), 2),
    ("simulator", ("--dp-size", "3"), 0),
]


@pytest.mark.parametrize(("name", "args", "gpus"), GPUS)
def test_gpus_needed(name: str, args: tuple[str, ...], gpus: int) -> None:
    assert ENGINES[name].gpus_needed(spec(name, *args)) == gpus


def test_sleep_opens_what_it_needs_and_nothing_else_does() -> None:
    for name, flag in (("vllm", "--enable-sleep-mode"), ("sglang", "--enable-memory-saver")):
        assert flag in words(name, LEASED, sleep=True)
        assert flag not in words(name, LEASED)
    for sleep in (True, False):
        env = ENGINES["vllm"].command(spec("vllm", sleep=sleep), LEASED, UNKNOWN_RELEASE).env
        assert ("VLLM_SERVER_DEV_MODE" in env) is sleep, "its paths take orders from anybody"
    assert "--enable-weights-cpu-backup" in words("sglang", LEASED, sleep=True)
    for draft in (("--speculative-draft-model-path", "/d"), ("--speculative-algorithm", "NEXTN")):
        both = words("sglang", LEASED, sleep=True, args=draft)
        assert "--enable-draft-weights-cpu-backup" in both
        assert "--enable-draft-weights-cpu-backup" not in words("sglang", LEASED, args=draft)


def test_adapters_are_loaded_at_the_start() -> None:
    adapters = {"a": "/x/a", "b": "hub/b"}
    line = words("vllm", LEASED, adapters=adapters)
    assert "--enable-lora --max-loras 2 --max-cpu-loras 32 --lora-modules a=/x/a b=hub/b" in line
    env = ENGINES["vllm"].command(spec("vllm", adapters=adapters), LEASED, UNKNOWN_RELEASE).env
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    line = words("sglang", LEASED, adapters=adapters)
    assert "--enable-lora --lora-paths a=/x/a b=hub/b" in line
    many = {str(number): "/x" for number in range(20)}
    assert "--max-loras 8 " in words("vllm", LEASED, adapters=many)
    ranks = spec("vllm", "-dp", "2", adapters=adapters)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in (
        ENGINES["vllm"].command(ranks, LEASED, UNKNOWN_RELEASE).env
    ), "vLLM does not start several API servers with it"
    own = words("vllm", LEASED, adapters=many, args=("--max-loras", "64"))
    assert "--max-cpu-loras" not in own, "which would have to be as many"


@pytest.mark.parametrize(
    ("release", "planned"), [(Release(0, 26), False), (Release(0, 27, 1), True)]
)
def test_the_start_up_plan_is_for_releases_that_have_it(release: Release, planned: bool) -> None:
    """An older one warns of a variable that it does not know."""
    env = ENGINES["vllm"].command(spec("vllm"), LEASED, release).env
    assert ("VLLM_ENABLE_STARTUP_PLAN" in env) is planned
    assert env["VLLM_PORT"] == "20006"


@pytest.mark.parametrize(
    ("release", "takes"), [(Release(0, 5, 17), False), (Release(0, 5, 20), True)]
)
def test_ids_are_given_where_chat_takes_them_from_the_head(release: Release, takes: bool) -> None:
    command = ENGINES["sglang"].command(spec("sglang"), LEASED, release)
    assert command.rid_header is takes
    assert (command.env.get("SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES") == "1") is takes
    for dialect in ("vllm", "sglang"):
        played = spec("simulator", "--dialect", dialect)
        command = ENGINES["simulator"].command(played, LEASED, UNKNOWN_RELEASE)
        assert command.rid_header is (dialect == "sglang")


@pytest.mark.parametrize(
    ("engine", "release", "name"),
    [
        ("vllm", Release(0, 27, 1), ""),
        ("vllm", Release(0, 30, 0), "x-vllm-priority"),
        ("vllm", UNKNOWN_RELEASE, ""),
        ("sglang", Release(0, 5, 17), ""),
        ("sglang", Release(0, 5, 20), "x-override-priority"),
    ],
)
def test_each_class_has_its_place_where_the_release_reads_it_from_the_head(
    engine: str, release: Release, name: str
) -> None:
    fields = ENGINES[engine].command(spec(engine), LEASED, release).priority_fields
    assert fields == (tuple(f"{name}: {number}" for number in PRIORITIES) if name else ())
    assert list(PRIORITIES) == sorted(set(PRIORITIES))


def test_a_pool_that_asks_for_first_come_first_served_has_no_places() -> None:
    own = spec("vllm", "--scheduling-policy", "fcfs")
    assert ENGINES["vllm"].command(own, LEASED, Release(0, 33)).priority_fields == ()


@pytest.mark.parametrize(("dialect", "name"), [("vllm", "vllm"), ("sglang", "override")])
def test_the_simulator_is_started_as_its_engine_is(dialect: str, name: str) -> None:
    played = spec("simulator", "--dialect", dialect)
    command = ENGINES["simulator"].command(played, LEASED, UNKNOWN_RELEASE)
    assert command.priority_fields == tuple(f"x-{name}-priority: {n}" for n in PRIORITIES)
    settings = parse_flags(list(command.argv[3:]))
    assert settings.rank(1) < settings.rank(2)


def test_both_engines_run_the_lower_priority_first_and_tell_cached_tokens() -> None:
    vllm, sglang = words("vllm", LEASED), words("sglang", LEASED)
    assert "--scheduling-policy priority" in vllm
    assert "--enable-priority-scheduling --schedule-low-priority-values-first" in sglang
    assert "--default-priority-value 0" in sglang, "else who names none is last of all"
    assert "--enable-prompt-tokens-details" in vllm
    assert "--enable-cache-report" in sglang
    assert "--page-size 64" in sglang, "with its default of 1 every token would be an event"


SPANS = [
    (features.VLLM, "kv_event_sources", Release(0, 31, 9), False),
    (features.VLLM, "kv_event_sources", Release(0, 32), True),
    (features.VLLM, "refuses_asleep", Release(0, 32), False),
    (features.SGLANG, "ready_path", Release(0, 5, 17), False),
    (features.SGLANG, "ready_path", Release(0, 5, 23), True),
    (features.SGLANG, "cuda_graph_max_bs", Release(0, 5, 17), True),
    (features.SGLANG, "cuda_graph_max_bs", Release(0, 5, 20), False),
    (features.SGLANG, "ready_path", UNKNOWN_RELEASE, False),
]


@pytest.mark.parametrize(("table", "name", "release", "there"), SPANS)
def test_features(
    table: dict[str, features.Span], name: str, release: Release, there: bool
) -> None:
    assert features.has(table, name, release) is there


def test_the_table_of_features_agrees_with_the_flags_that_were_read() -> None:
    for table, engine, name, flag in (
        (features.VLLM, "vllm", "queue_limits", "--max-num-queued-reqs"),
        (features.VLLM, "vllm", "sse_keep_alive", "--sse-keep-alive-interval"),
        (features.SGLANG, "sglang", "gated_launch", "--gated-launch-port"),
        (features.SGLANG, "sglang", "load_socket", "--load-publish-endpoint"),
        (features.SGLANG, "sglang", "weight_cache", "--weight-cache-mode"),
        (features.SGLANG, "sglang", "cuda_graph_max_bs", "--cuda-graph-max-bs"),
    ):
        flags = flag_table(engine)
        for release in flags.releases:
            assert features.has(table, name, release) == available(
                flags, flags.flags[flag], release
            ), (flag, release)
