"""The simulator: an engine server of our own that speaks the dialect its arguments name."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import msgspec

from backends.engines.base import (
    Call,
    Engine,
    Entry,
    KvEvents,
    Launch,
    Ports,
    PortsNeeded,
    count_option,
    given,
    kv_endpoints,
    kv_events_of,
    option,
    trace_flags,
)
from backends.engines.facts import Facts
from backends.engines.release import Release, parse_release
from backends.engines.sglang import FIELDS_BY_CLASS, OVERRIDES, PRIORITY_FLAGS, Sglang
from backends.engines.vllm import Vllm, fields_by_class
from backends.simulator.settings import VERSIONS
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample
from proxy.contract.engines import read_any

_DIALECTS: dict[str, Engine] = {"vllm": Vllm(), "sglang": Sglang()}
_KV_FLAGS = ("--kv-events-config", "--kv-events-port")


class Simulator:
    """How the simulator is launched; probed and read as the engine whose part it plays."""

    name = "simulator"
    entry: Entry | None = None
    uses_gpu = False

    def command(self, spec: ReplicaSpec, ports: Ports, release: Release) -> Launch:
        dialect = _dialect(spec).name
        argv = (
            *(sys.executable, "-m", "backends.simulator"),
            *("--host", ports.host, "--port", str(ports.http), "--model", spec.model),
            *(PRIORITY_FLAGS if dialect == "sglang" else ("--scheduling-policy", "priority")),
            *_kv_flags(ports),
            *(("--enable-sleep-mode",) if spec.sleep or spec.snapshot else ()),
            *(("--lora-modules", *spec.adapters) if spec.adapters else ()),
            *trace_flags(spec),
            *spec.args,
        )
        # As with vLLM, so that the proxy's pooled connections are not closed under it.
        env = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"}
        if spec.adapters:
            env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        if dialect == "vllm":
            played = parse_release(VERSIONS["vllm"])
            return Launch(argv, env, priority_fields=fields_by_class(spec, played))
        env[OVERRIDES] = "1"
        return Launch(argv, env, rid_header=True, priority_fields=FIELDS_BY_CLASS)

    def check(self, spec: ReplicaSpec, release: Release) -> tuple[str, ...]:
        return ()

    def ports_needed(self, spec: ReplicaSpec, release: Release) -> PortsNeeded:
        ranks = count_option(spec.args, "--data-parallel-size", "--dp-size")
        events = 0 if given(spec.args, *_KV_FLAGS) else ranks
        return PortsNeeded(events, events)

    def gpus_needed(self, spec: ReplicaSpec) -> int:
        return 0

    def kv_source(self, spec: ReplicaSpec, ports: Ports, release: Release) -> KvEvents | None:
        return None if given(spec.args, *_KV_FLAGS) else kv_events_of(ports)

    def sleep_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        return _dialect(spec).sleep_calls(spec, level)

    def wake_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        return _dialect(spec).wake_calls(spec, level)

    def balk_calls(self, spec: ReplicaSpec, level: int, done: int) -> tuple[Call, ...] | None:
        return _dialect(spec).balk_calls(spec, level, done)

    def sleep_level(self, spec: ReplicaSpec) -> int:
        return _dialect(spec).sleep_level(spec)

    def dump_level(self, spec: ReplicaSpec) -> int:
        return _dialect(spec).dump_level(spec)

    def adapter_calls(
        self, spec: ReplicaSpec, loaded: Mapping[str, str], wanted: Mapping[str, str]
    ) -> tuple[Call, ...]:
        return _dialect(spec).adapter_calls(spec, loaded, wanted)

    def facts(self, spec: ReplicaSpec) -> Facts:
        return _dialect(spec).facts(spec)

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return _dialect(spec).ready_paths(spec)

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return _dialect(spec).load_paths(spec)

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        """Tell the dialect from the names."""
        found = read_any(answers, at_s)
        return found[1] if found else None


def _kv_flags(ports: Ports) -> tuple[str, ...]:
    if not ports.kv_events:
        return ()
    return ("--kv-events-config", msgspec.json.encode(kv_endpoints(ports)).decode())


def _dialect(spec: ReplicaSpec) -> Engine:
    return _DIALECTS.get(option(spec.args, "--dialect") or "vllm", _DIALECTS["vllm"])
