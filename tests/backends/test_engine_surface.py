"""What the adapters call and read is there, in every release whose routes and names were read.

The routes of vLLM 0.26.0 are those that it printed at its start; the other lists, and the names of
metrics, are from the decorators and declarations in the engines' sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from backends.engines import ENGINES, features
from backends.engines.base import Call
from backends.engines.release import parse_release
from backends.spec import ReplicaSpec
from proxy.contract import engines as contract

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = ReplicaSpec(
    replica_id="m-0", model="m", pool="m", engine="vllm", sleep=True, adapters={"a": "/a"}
)
ROUTES = [
    tuple(path.name.split("-")[:2]) for path in sorted(GOLDEN.glob("*-routes.txt"))
]  # engine and release
# Mounted otherwise than by a decorator, or only when the environment asks for it.
ELSEWHERE = {("GET", "/metrics")}
BY_ENVIRONMENT = {("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")}


def routes(engine: str, release: str) -> set[tuple[str, str]]:
    lines = (GOLDEN / f"{engine}-{release}-routes.txt").read_text().splitlines()
    return {(line.split()[0], line.split()[1]) for line in lines}


def asked(engine: str) -> Iterator[tuple[str, str]]:
    """Yield the method and the path of everything that a replica is asked."""
    adapter = ENGINES[engine]
    wanted = msgspec.structs.replace(SPEC, engine=engine)
    calls: list[Call] = [*adapter.adapter_calls(wanted, {"b": "/b"}, {"a": "/a"})]
    for level in (1, 2) if engine == "vllm" else (1,):
        calls += adapter.sleep_calls(wanted, level) + adapter.wake_calls(wanted, level)
    for call in calls:
        yield call.method, call.path.partition("?")[0]
    for path in (*adapter.ready_paths(wanted), *adapter.load_paths(wanted), contract.MODELS_PATH):
        yield "GET", path
    abort = adapter.facts(wanted).abort_path
    if abort:
        yield "POST", abort


@pytest.mark.parametrize(("engine", "release"), ROUTES)
def test_every_path_is_there(engine: str, release: str) -> None:
    missing = set(asked(engine)) - routes(engine, release) - ELSEWHERE
    if engine == "vllm" and release == "0.26.0":
        missing -= BY_ENVIRONMENT  # not set when its routes were printed
    if not features.has(features.SGLANG, "ready_path", parse_release(release)):
        missing -= {("GET", "/ready")}  # asked first, and 404 is an answer
    assert missing == set()


def test_releases_at_both_ends_of_what_is_supported_were_read() -> None:
    found = {engine: [parse_release(r) for e, r in ROUTES if e == engine] for engine, _ in ROUTES}
    assert max(found["vllm"]) == features.VLLM_RANGE.newest
    assert {min(found["sglang"]), max(found["sglang"])} == set(features.SGLANG_RANGE)


@pytest.mark.parametrize(
    ("engine", "name", "path"),
    [
        ("vllm", "kv_event_sources", "/kv_event_sources"),
        ("vllm", "release_kv_cache", "/release_kv_cache_memory"),
        ("sglang", "ready_path", "/ready"),
        ("sglang", "get_load", "/get_load"),
    ],
)
def test_features_that_are_paths(engine: str, name: str, path: str) -> None:
    table = features.VLLM if engine == "vllm" else features.SGLANG
    for release in [release for one, release in ROUTES if one == engine]:
        there = any(route == path for _, route in routes(engine, release))
        assert features.has(table, name, parse_release(release)) == there, release


def exposed(engine: str, release: str) -> set[str]:
    """Return the names of the series on the page: the client library adds endings."""
    names = set()
    text = (GOLDEN / f"{engine}-{release}-metric-names.txt").read_text()
    for line in text.splitlines():
        kind, name = line.split()
        names.add(name)
        if kind == "counter":
            names.add(name.removesuffix("_total") + "_total")
        elif kind == "histogram":
            names |= {name + "_sum", name + "_count"}
    return names


def read_names(engine: str) -> dict[str, tuple[str, ...]]:
    """Return what the contract reads: each field with the series that may tell it."""
    if engine == "sglang":
        return dict(contract._SGLANG_METRICS.series)
    further = (contract._CACHE_INFO, contract._SLEEP_STATE, contract._ADAPTERS_INFO)
    return dict(contract._VLLM_METRICS.series) | {name: (name,) for name in further}


NEWEST = [("vllm", "0.33.0"), ("sglang", "0.5.23")]
RECORDED = [("vllm", "0.26.0"), ("sglang", "0.5.17")]
NAMED_OTHERWISE = {"vllm:cache_config_info"}  # by a variable, in all of them
# Shown once it is not zero; and only where there are adapters.
UNUSED_YET = {"sglang:num_retracted_requests_total", "vllm:lora_requests_info"}


@pytest.mark.parametrize(("engine", "release"), NEWEST)
def test_every_figure_has_a_name_in_the_newest_release(engine: str, release: str) -> None:
    there = exposed(engine, release) | NAMED_OTHERWISE
    for field, names in read_names(engine).items():
        assert there & set(names), field


@pytest.mark.parametrize(("engine", "release"), RECORDED)
def test_every_figure_is_on_the_recorded_page(engine: str, release: str) -> None:
    page = (GOLDEN / f"{engine}-{release}-metrics.txt").read_text()
    for field, names in read_names(engine).items():
        assert any(f"\n{name}" in page for name in names) or set(names) & UNUSED_YET, field
