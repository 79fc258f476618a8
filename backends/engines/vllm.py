"""vLLM: `vllm serve`, ready when it listens (0.23 to 0.33).

Sleep mode, and the unauthenticated development endpoints that command it, are on only where the
pool asks for them (`sleep`, `snapshot`); the engine listens on loopback, or in a cell that nothing
but this machine reaches, so they are this machine's alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from backends.engines.base import (
    Call,
    Entry,
    FlagError,
    KvEvents,
    Launch,
    Ports,
    PortsNeeded,
    count_option,
    given,
    kv_endpoints,
    kv_events_of,
    lora_calls,
    option,
    priority_fields,
    trace_environment,
    trace_flags,
)
from backends.engines.dumps import ENVIRONMENT, HOOK, reads_weights
from backends.engines.facts import VLLM as FACTS
from backends.engines.facts import Facts
from backends.engines.features import VLLM as FEATURES
from backends.engines.features import VLLM_RANGE, has
from backends.engines.flags import check_flags, check_name, check_range, flag_table, refuse
from backends.engines.release import Release
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample
from proxy.contract.engines import VLLM

_KV_FLAG = "--kv-events-config"
_DP_FLAGS = ("--data-parallel-size", "-dp")
_DP_LOCAL_FLAGS = ("--data-parallel-size-local", "-dpl")
# A rank of a server elsewhere publishes so many ports on, and nobody leased those.
_RANK_FLAGS = ("--data-parallel-rank", "-dpn", "--data-parallel-start-rank", "-dpr")
# It scans upwards from VLLM_PORT on (utils/network_utils.py), so this is room, not a limit.
_INTERNAL_PORTS = 8
# Adapters of one batch. vLLM makes room for them all; SGLang's default is this many.
_LORAS_TOGETHER = 8
# Adapters in host memory. Its default, those of one batch, would have it read an adapter from disk
# at each turn once more have come at run time (lora/worker_manager.py); unused room costs nothing.
_LORAS_KEPT = 32
_REFUSED = {
    "--host": "it is 127.0.0.1, where the manager and the proxy reach it",
    "--port": "the manager leases it, so that replicas do not meet",
    "--uds": "replicas are reached by TCP",
    "--model": "say model_path in the pool",
    "--headless": "it would serve no HTTP",
    "--grpc": "it would serve no HTTP",
    "--ssl-keyfile": "replicas are reached by plain HTTP on loopback",
    "--ssl-certfile": "replicas are reached by plain HTTP on loopback",
}
_DRAFT_FLAGS = ("--speculative-config", "-sc", "--spec-model", "--spec-method")
_EXTENSION_FLAG, _EXTENSION = "--worker-extension-cls", "doherty_weights.Weights"  # of `HOOK`
_FORM_VARIABLE = "DOHERTY_WEIGHTS_FORM"  # by which it tells apart what lies in memory otherwise
_DRAIN_S = 60.0
_COPY_S = 120.0  # level 1 copies the weights to host memory, slowly where that is touched first


class Vllm:
    """How a vLLM server is launched, probed and read."""

    name = "vllm"
    entry = Entry("vllm", ("vllm",), ("-m", "vllm.entrypoints.cli.main"))
    uses_gpu = True

    def command(self, spec: ReplicaSpec, ports: Ports, release: Release) -> Launch:
        """Always with a model: `vllm serve` alone would fetch one of its own choice."""
        argv = (
            *("vllm", "serve", spec.model_path or spec.model),
            *("--host", ports.host, "--port", str(ports.http), "--served-model-name", spec.model),
            *("--scheduling-policy", "priority", "--enable-prefix-caching"),
            *("--enable-request-id-headers", "--enable-prompt-tokens-details"),
            *("--shutdown-timeout", str(int(spec.stop_grace_s))),
            *(_kv_flags(ports) if _tells_events(spec) else ()),
            *(("--enable-sleep-mode",) if _can_sleep(spec) else ()),
            *((_EXTENSION_FLAG, _EXTENSION) if self._keeps_a_file(spec) else ()),
            *lora_flags(spec),
            *trace_flags(spec),
            *spec.args,
        )
        env = _environment(spec, ports, release)
        if self._keeps_a_file(spec):
            env[_FORM_VARIABLE] = _form(spec)
        return Launch(argv, env, HOOK, priority_fields=fields_by_class(spec, release))

    def check(self, spec: ReplicaSpec, release: Release) -> tuple[str, ...]:
        refuse(flag_table(self.name), spec.args, _REFUSED, release)
        check_name(self.name, spec.args, spec.model)
        warnings = check_range(self.name, release, *VLLM_RANGE)
        warnings += check_flags(flag_table(self.name), spec.args, release)
        if given(spec.args, "--disable-log-stats"):
            warnings += (
                "vllm: --disable-log-stats hides the load; routing goes by its own counts",
            )
        if given(spec.args, "--api-key"):
            warnings += (
                "vllm: a key keeps the manager from the names of adapters; it listens on "
                "loopback, so leave keys to the proxy",
            )
        return warnings

    def ports_needed(self, spec: ReplicaSpec, release: Release) -> PortsNeeded:
        ranks = _ranks_here(spec.args)
        events = ranks if _tells_events(spec) else 0
        return PortsNeeded(events, events, 0 if "VLLM_PORT" in spec.env else _INTERNAL_PORTS)

    def gpus_needed(self, spec: ReplicaSpec) -> int:
        args = spec.args
        ranks = _ranks_here(args)
        tensor = count_option(args, "--tensor-parallel-size", "-tp")
        pipeline = count_option(args, "--pipeline-parallel-size", "-pp")
        context = count_option(args, "--prefill-context-parallel-size", "-pcp")
        nodes = count_option(args, "--nnodes", "-n") or 1
        return ranks * tensor * pipeline * context // nodes or 1

    def kv_source(self, spec: ReplicaSpec, ports: Ports, release: Release) -> KvEvents | None:
        return kv_events_of(ports) if _tells_events(spec) else None

    def sleep_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        """What runs may end first; the answers of both paths say whether it sleeps."""
        if not _can_sleep(spec):
            raise FlagError("vllm was not started with sleep mode; set `sleep: true` in its pool")
        if level not in (1, 2):
            raise FlagError(f"vllm has no sleep level {level} that frees memory; take 1 or 2")
        if level == 2 and given(spec.args, *_DRAFT_FLAGS):
            raise FlagError("vllm reloads no draft model after sleep level 2; take 1")
        keep = Call(
            "POST",
            "/collective_rpc",
            b'{"method":"doherty_keep"}',
            timeout_s=_COPY_S,
            why="write the weights to a file, which is quicker to come back from",
        )
        return (
            *((keep,) if level == 2 and self._keeps_a_file(spec) else ()),
            Call(
                "POST",
                f"/sleep?level={level}&mode=wait",
                timeout_s=_DRAIN_S + _COPY_S,
                why="let requests end, then free the KV cache and the weights",
            ),
            Call("GET", "/is_sleeping", expect=b'{"is_sleeping":true}', why="see that it sleeps"),
        )

    def wake_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        """After level 2 the weights are read anew, before there is room for anything else."""
        if level == 2:
            method = b"doherty_fill" if self._keeps_a_file(spec) else b"reload_weights"
            wakes: tuple[Call, ...] = (
                Call("POST", "/wake_up?tags=weights", timeout_s=_COPY_S, why="room for weights"),
                Call(
                    "POST",
                    "/collective_rpc",
                    b'{"method":"%s"}' % method,
                    timeout_s=spec.start_timeout_s,
                    why="read the weights, which level 2 threw away",
                ),
                Call("POST", "/wake_up?tags=kv_cache", timeout_s=_COPY_S, why="room for the cache"),
            )
        else:
            wakes = (Call("POST", "/wake_up", timeout_s=_COPY_S, why="take everything back"),)
        awake = Call("GET", "/is_sleeping", expect=b'{"is_sleeping":false}', why="see it awake")
        return (*wakes, awake)

    def balk_calls(self, spec: ReplicaSpec, level: int, done: int) -> tuple[Call, ...] | None:
        """To wake it is right whatever it did: awake, it only logs a warning."""
        return self.wake_calls(spec, level)

    def _keeps_a_file(self, spec: ReplicaSpec) -> bool:
        """Say whether our extension of its worker keeps the weights for level 2."""
        own = given(spec.args, _EXTENSION_FLAG)
        return spec.snapshot and self.dump_level(spec) == 2 and not own

    def sleep_level(self, spec: ReplicaSpec) -> int:
        return 1

    def dump_level(self, spec: ReplicaSpec) -> int:
        """Without weights where it can read them again: base model alone, from files."""
        again = reads_weights(spec.args) and not spec.adapters
        return 2 if again and not given(spec.args, *_DRAFT_FLAGS) else 1

    def adapter_calls(
        self, spec: ReplicaSpec, loaded: Mapping[str, str], wanted: Mapping[str, str]
    ) -> tuple[Call, ...]:
        return lora_calls(loaded, wanted, "/v1/load_lora_adapter", "/v1/unload_lora_adapter")

    def facts(self, spec: ReplicaSpec) -> Facts:
        """Of several API servers one would hear of an adapter, so vLLM refuses to start them so."""
        if _api_servers(spec) == 1:
            return FACTS
        return msgspec.structs.replace(FACTS, adapters_at_run_time=False)

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return FACTS.ready_paths

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return VLLM.paths

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        return VLLM.read(answers, at_s)


def fields_by_class(spec: ReplicaSpec, release: Release) -> tuple[str, ...]:
    """Return the fields that put requests in their places, where the release reads one.

    A pool that asks for another policy gets it, and then no number changes the order.
    """
    policy = option(spec.args, "--scheduling-policy") or "priority"
    reads = has(FEATURES, "priority_header", release) and policy == "priority"
    return priority_fields("x-vllm-priority") if reads else ()


def _form(spec: ReplicaSpec) -> str:
    """Name what decides how a worker lays out the weights: all that the pool tells the engine."""
    told = msgspec.json.encode([spec.model_path or spec.model, spec.args, sorted(spec.env.items())])
    return hashlib.sha256(told).hexdigest()[:16]


def _can_sleep(spec: ReplicaSpec) -> bool:
    """What is to be dumped has to let go of its memory before."""
    return spec.sleep or spec.snapshot


def _kv_flags(ports: Ports) -> tuple[str, ...]:
    if not ports.kv_events:
        return ()
    config = {"enable_kv_cache_events": True, "publisher": "zmq"} | kv_endpoints(ports)
    return (_KV_FLAG, msgspec.json.encode(config).decode())


def _ranks_here(args: Sequence[str]) -> int:
    """Return the data-parallel ranks of this machine: all of them unless it is told how many."""
    return count_option(args, *_DP_LOCAL_FLAGS, default=0) or count_option(args, *_DP_FLAGS)


def _tells_events(spec: ReplicaSpec) -> bool:
    """Say whether the events are ours to configure, and there are any."""
    return not given(spec.args, _KV_FLAG, "--no-enable-prefix-caching", *_RANK_FLAGS)


def lora_flags(spec: ReplicaSpec) -> tuple[str, ...]:
    """Return what loads the adapters of `spec` and leaves room for some more."""
    if not spec.adapters:
        return ()
    together = str(min(len(spec.adapters), _LORAS_TOGETHER))
    kept = ("--max-cpu-loras", str(max(len(spec.adapters), _LORAS_KEPT)))
    room = () if given(spec.args, "--max-loras") else kept  # it may not be less than a batch has
    modules = [f"{name}={path}" for name, path in spec.adapters.items()]
    return ("--enable-lora", "--max-loras", together, *room, "--lora-modules", *modules)


def _api_servers(spec: ReplicaSpec) -> int:
    """Return how many there are: as many as ranks, where nobody says (entrypoints/cli/serve.py)."""
    ranks = max(count_option(spec.args, *flags) for flags in (_DP_FLAGS, _DP_LOCAL_FLAGS))
    return count_option(spec.args, "--api-server-count", "-asc", default=ranks)


def _environment(spec: ReplicaSpec, ports: Ports, release: Release) -> dict[str, str]:
    # The default keep-alive of 5 s would close connections that the proxy holds in its pool.
    env = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120", **trace_environment(spec)}
    if has(FEATURES, "startup_plan", release):
        env["VLLM_ENABLE_STARTUP_PLAN"] = "1"
    if ports.internal:
        env["VLLM_PORT"] = str(ports.internal)
    if _can_sleep(spec):
        env["VLLM_SERVER_DEV_MODE"] = "1"
    if spec.snapshot:
        env |= ENVIRONMENT
    if spec.adapters and _api_servers(spec) == 1:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    return env
