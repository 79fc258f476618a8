"""Each start, wake, sleep and stop of a replica is a span, and says what became of it."""

from __future__ import annotations

import pytest

from backends.engines.base import Launch, Ports, launch_hash
from backends.engines.release import UNKNOWN_RELEASE
from backends.engines.sglang import Sglang
from backends.engines.simulator import Simulator
from backends.engines.vllm import Vllm
from backends.lifecycle import Phase
from backends.moves import Moves, Nobody, Step
from backends.spec import ReplicaSpec, pool_specs
from proxy.config import parse_config
from proxy.contract.spans import SpanRecord

SPEC = ReplicaSpec(replica_id="m-0", model="m", pool="m", engine="vllm")
URL = "http://collector:4318/v1/traces"


class Told:
    """The spans that come of steps, one second apart."""

    def __init__(self) -> None:
        self.spans: list[SpanRecord] = []
        self.moves = Moves(self.spans.append, lambda octets: octets)
        self.at_s = 0.0

    def go(self, *phases: Phase, rung: str = "cold") -> list[SpanRecord]:
        for phase in phases:
            self.at_s += 1.0
            self.moves.step(Step(SPEC, phase, f"to {phase}", f"why {phase}", rung, self.at_s))
        made, self.spans[:] = list(self.spans), []
        return made


def test_a_start_lasts_until_it_is_ready() -> None:
    told = Told()
    (span,) = told.go(Phase.STARTING, Phase.READY)
    assert (span.name, span.start_ns, span.end_ns) == (
        "replica start",
        1_000_000_000,
        2_000_000_000,
    )
    assert (span.parent_id, span.error) == (0, None)
    assert span.attributes["doherty.replica"] == "m-0"
    assert span.attributes["doherty.rung"] == "cold"
    assert span.attributes["doherty.reason"] == "why starting"


def test_a_start_that_fails_says_how() -> None:
    told = Told()
    (span,) = told.go(Phase.STARTING, Phase.BACKOFF)
    assert span.error == "why backoff"
    assert span.attributes["error.type"] == "to backoff"


def test_phases_on_one_way_are_one_move() -> None:
    told = Told()
    assert told.go(Phase.STARTING, Phase.READY)
    (slept,) = told.go(Phase.EMPTYING, Phase.FALLING_ASLEEP, Phase.ASLEEP, rung="awake")
    assert (slept.name, slept.error) == ("replica sleep", None)
    assert slept.end_ns - slept.start_ns == 2_000_000_000
    (woken,) = told.go(Phase.WAKING, Phase.READY, rung="asleep")
    assert (woken.name, woken.attributes["doherty.rung"]) == ("replica wake", "asleep")
    (stopped,) = told.go(Phase.DRAINING, Phase.STOPPING, Phase.KILLING, Phase.STOPPED)
    assert (stopped.name, stopped.error) == ("replica stop", None)


def test_what_is_broken_off_by_another_move_has_failed() -> None:
    started, stopped = Told().go(Phase.STARTING, Phase.STOPPING, Phase.STOPPED)
    assert (started.name, started.error) == ("replica start", "why stopping")
    assert (stopped.name, stopped.error) == ("replica stop", None)
    slept, woken = Told().go(Phase.EMPTYING, Phase.WAKING, Phase.BACKOFF)
    assert (slept.error, woken.error) == ("why waking", "why backoff")


def test_nobody_is_told_where_traces_are_off() -> None:
    Nobody().step(Step(SPEC, Phase.READY, "", "", "", 0.0))


# --- engines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [Vllm(), Sglang(), Simulator()])
def test_an_engine_is_told_where_its_traces_go(engine: Vllm | Sglang | Simulator) -> None:
    def launched(url: str, *args: str) -> Launch:
        spec = ReplicaSpec(
            replica_id="m-0", model="m", pool="m", engine=engine.name, traces_url=url, args=args
        )
        return engine.command(spec, Ports(1), UNKNOWN_RELEASE)

    told = launched(URL)
    assert told.argv[told.argv.index("--otlp-traces-endpoint") + 1] == URL
    assert ("--enable-trace" in told.argv) is (engine.name == "sglang")
    protocol = told.env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
    assert protocol == ("http/protobuf" if engine.uses_gpu else None)
    untold = launched("")
    assert "--otlp-traces-endpoint" not in untold.argv
    assert "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL" not in untold.env
    own = launched(URL, "--otlp-traces-endpoint", "mine:4317")  # a pool's word goes before ours
    assert own.argv.count("--otlp-traces-endpoint") == 1
    assert "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL" not in own.env
    changed = [
        ReplicaSpec(replica_id="m-0", model="m", pool="m", engine=engine.name, traces_url=url)
        for url in ("", URL)
    ]
    assert len({launch_hash(engine, spec) for spec in changed}) == 2  # so it is restarted


@pytest.mark.parametrize(
    ("proxy", "manager", "url"),
    [
        ("{}", "{}", ""),
        ("{enable_trace: true}", "{}", ""),  # where to, only the environment knows
        ("{otlp_traces_endpoint: 'http://collector:4318'}", "{}", URL),
        ("{otlp_traces_endpoint: 'http://collector:4318'}", "{trace_engines: false}", ""),
    ],
)
def test_engines_trace_where_the_proxy_does(proxy: str, manager: str, url: str) -> None:
    text = f"proxy: {proxy}\nmanager: {manager}\nmodels: [{{name: m, pools: [{{engine: vllm}}]}}]"
    (pool,) = pool_specs(parse_config(text, "f"))
    assert pool.first.traces_url == url
