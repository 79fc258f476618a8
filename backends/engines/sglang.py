"""SGLang: `sglang serve`, ready by `/ready` (0.5.10 to 0.5.23).

`/health` would run a generation unless it is told not to; the environment tells it. With
`--schedule-low-priority-values-first` both engines count priority in one direction.

The memory saver is on only where the pool asks for it (`sleep`, `snapshot`): a wrong release or
resume call does not fail but kills the server. So the calls are these and no others: idle is
insisted on by `/flush_cache`, which tests what release asserts, and what is resumed is named,
because a tag that is not out is fatal too.

Whether weights are copied to host memory before they are let go of is a flag of the start, so one
replica sleeps in one way only. With `sleep` alone they are (level 1: awake in 0.4 s). With
`snapshot` they are read from the disk again (level 2): the copy stays in the process once it was
made, so an image would hold it (of 16 GB of weights 21.2 GiB, 18 s to restore; without it 5.9 GiB,
7 s), and so would host memory while it rests.
"""

from __future__ import annotations

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
from backends.engines.facts import SGLANG as FACTS
from backends.engines.facts import Facts
from backends.engines.features import SGLANG as FEATURES
from backends.engines.features import SGLANG_RANGE, has
from backends.engines.flags import check_flags, check_name, check_range, flag_table, refuse
from backends.engines.release import Release
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample
from proxy.contract.engines import SGLANG

# By it the proxy names a request, and ends it when its client has left; what clients say in such
# fields the proxy keeps to itself.
OVERRIDES = "SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES"
FIELDS_BY_CLASS = priority_fields("x-override-priority")
# A request that names no priority would be last of all (managers/scheduler.py takes sys.maxsize for
# it), and nothing could be put behind it; so it gets vLLM's default. With the switch between them
# both engines count in one direction.
PRIORITY_FLAGS = (
    *("--enable-priority-scheduling", "--schedule-low-priority-values-first"),
    *("--default-priority-value", "0"),
)
_KV_FLAG = "--kv-events-config"
_DP_FLAGS = ("--dp-size", "--data-parallel-size", "--dp")
_PP_FLAGS = ("--pp-size", "--pipeline-parallel-size", "--pp")
_TAGS = b'{"tags":["kv_cache","weights","cuda_graph"]}'  # all, as without tags, but said
_REFUSED = {
    "--host": "it is 127.0.0.1, where the manager and the proxy reach it",
    "--port": "the manager leases it, so that replicas do not meet",
    "--model-path": "say model_path in the pool",
    "--model": "say model_path in the pool",
    "--grpc-mode": "it would serve no HTTP",
    "--smg-grpc-mode": "it would serve no HTTP",
    "--encoder-only": "it would serve no chat",
    "--ssl-keyfile": "replicas are reached by plain HTTP on loopback",
    "--ssl-certfile": "replicas are reached by plain HTTP on loopback",
}
_DRAFT_FLAGS = (
    *("--speculative-algorithm", "--speculative-draft-model-path"),
    "--speculative-draft-model",
)
_FLUSH_S = 10
_COPY_S = 120.0  # weights to host memory and back, slowly where that is touched first


class Sglang:
    """How an SGLang server is launched, probed and read."""

    name = "sglang"
    # Not `-m sglang.cli.main serve`: this module is older than the command line, and still there.
    entry = Entry("sglang", ("sglang", "serve"), ("-m", "sglang.launch_server"))
    uses_gpu = True

    def command(self, spec: ReplicaSpec, ports: Ports, release: Release) -> Launch:
        argv = (
            *("sglang", "serve", "--model-path", spec.model_path or spec.model),
            *("--host", ports.host, "--port", str(ports.http), "--served-model-name", spec.model),
            *("--page-size", "64", "--enable-metrics", "--enable-cache-report"),
            *PRIORITY_FLAGS,
            *(_kv_flags(ports) if _tells_events(spec, release) else ()),
            *(("--nccl-port", str(ports.internal)) if ports.internal else ()),
            *_sleep_flags(spec),
            *_lora_flags(spec),
            *trace_flags(spec, "--enable-trace"),
            *spec.args,
        )
        env = trace_environment(spec) | {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
        rid_header = has(FEATURES, "chat_overrides", release)
        if rid_header:
            env[OVERRIDES] = "1"
        return Launch(
            argv,
            {**env, **ENVIRONMENT} if spec.snapshot else env,
            HOOK,
            rid_header,
            FIELDS_BY_CLASS if rid_header else (),
        )

    def check(self, spec: ReplicaSpec, release: Release) -> tuple[str, ...]:
        refuse(flag_table(self.name), spec.args, _REFUSED, release)
        check_name(self.name, spec.args, spec.model)
        if _can_sleep(spec) and (option(spec.args, "--weight-cache-mode") or "off") != "off":
            raise FlagError(
                "sglang: a weight cache dies of being put to sleep; take --weight-cache-mode out "
                "of args, or set `sleep` and `snapshot` to false"
            )
        warnings = check_range(self.name, release, *SGLANG_RANGE)
        warnings += check_flags(flag_table(self.name), spec.args, release)
        if given(spec.args, "--api-key", "--admin-api-key"):
            warnings += (
                "sglang: a key keeps the manager from its load, its names and its sleep; it "
                "listens on loopback, so leave keys to the proxy",
            )
        if spec.adapters:
            warnings += (
                "sglang serves an adapter to requests with lora_path, or whose model is "
                f"'{spec.model}:ADAPTER'; by the adapter's name alone it serves the base model",
            )
        return warnings

    def ports_needed(self, spec: ReplicaSpec, release: Release) -> PortsNeeded:
        events = _ranks(spec) if _tells_events(spec, release) else 0
        return PortsNeeded(events, events, 0 if given(spec.args, "--nccl-port") else 1)

    def gpus_needed(self, spec: ReplicaSpec) -> int:
        args = spec.args
        ranks = 1 if _shares_gpus(spec) else count_option(args, *_DP_FLAGS)
        tensor = count_option(args, "--tp-size", "--tensor-parallel-size", "--tp")
        pipeline = count_option(args, *_PP_FLAGS)
        return ranks * tensor * pipeline // (count_option(args, "--nnodes") or 1) or 1

    def kv_source(self, spec: ReplicaSpec, ports: Ports, release: Release) -> KvEvents | None:
        return kv_events_of(ports) if _tells_events(spec, release) else None

    def sleep_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        if not _can_sleep(spec):
            raise FlagError("sglang has no memory saver; set `sleep: true` in its pool")
        wanted = self.sleep_level(spec)
        if level != wanted:
            raise FlagError(f"sglang has no sleep level {level} here; take {wanted}")
        return (
            Call(
                "POST",
                "/pause_generation",
                b'{"mode":"abort"}',
                timeout_s=60.0,
                why="nothing may run, or the release kills the server; new requests wait",
            ),
            Call(
                "POST",
                f"/flush_cache?timeout={_FLUSH_S}",
                timeout_s=_FLUSH_S + 10.0,
                why="refused while anything runs: 200 is the proof that a release is safe",
            ),
            Call(
                "POST",
                "/release_memory_occupation",
                _TAGS,
                timeout_s=_COPY_S,
                why="free the KV cache, and the weights after a copy to host memory",
            ),
        )

    def wake_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        """After level 2 the weights are read anew before anything runs on them."""
        reread = Call(
            "POST",
            "/update_weights_from_disk",
            msgspec.json.encode({"model_path": spec.model_path or spec.model}),
            timeout_s=spec.start_timeout_s,
            why="read the weights, of which there was no copy",
            expect=b'"success":true',
        )
        return (
            Call(
                "POST",
                "/resume_memory_occupation",
                _TAGS,
                timeout_s=_COPY_S,
                why="exactly what was released: another tag, or twice, kills the server",
            ),
            *((reread,) if level == 2 else ()),
            Call("POST", "/continue_generation", b"{}", why="let requests run again"),
            # 404 before 0.5.20, and /health without a generation says as much then.
            Call("GET", "/ready", statuses=(200, 404), why="see that it is no longer paused"),
            Call("GET", "/health", why="see that it answers"),
        )

    def balk_calls(self, spec: ReplicaSpec, level: int, done: int) -> tuple[Call, ...] | None:
        """Before the release nothing is out, and nothing may be resumed: it is only paused."""
        released = len(self.sleep_calls(spec, level)) - 1
        return self.wake_calls(spec, 1)[1:] if done < released else None

    def sleep_level(self, spec: ReplicaSpec) -> int:
        return 1 if _keeps_weights(spec) else 2

    def dump_level(self, spec: ReplicaSpec) -> int:
        return self.sleep_level(spec)

    def adapter_calls(
        self, spec: ReplicaSpec, loaded: Mapping[str, str], wanted: Mapping[str, str]
    ) -> tuple[Call, ...]:
        return lora_calls(loaded, wanted, "/load_lora_adapter", "/unload_lora_adapter")

    def facts(self, spec: ReplicaSpec) -> Facts:
        """Adapters change only where one scheduler, or DP attention, hears of it all."""
        if _shares_gpus(spec) or count_option(spec.args, *_DP_FLAGS) == 1:
            return FACTS
        return msgspec.structs.replace(FACTS, adapters_at_run_time=False)

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return FACTS.ready_paths

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return SGLANG.paths

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        return SGLANG.read(answers, at_s)


def _kv_flags(ports: Ports) -> tuple[str, ...]:
    if not ports.kv_events:
        return ()
    config = {"publisher": "zmq"} | kv_endpoints(ports)
    return (_KV_FLAG, msgspec.json.encode(config).decode())


def _tells_events(spec: ReplicaSpec, release: Release) -> bool:
    """Say whether the events are ours to configure, there are any, and nothing dies of them."""
    if given(spec.args, _KV_FLAG, "--disable-radix-cache"):
        return False
    ranks = 1 if _shares_gpus(spec) else count_option(spec.args, *_DP_FLAGS)
    alone = ranks * count_option(spec.args, *_PP_FLAGS) == 1
    return alone or has(FEATURES, "kv_events_by_rank", release)


def _ranks(spec: ReplicaSpec) -> int:
    """Return how many caches there are, each with events of its own."""
    return max(count_option(spec.args, *_DP_FLAGS), count_option(spec.args, "--attn-dp-size"))


def _shares_gpus(spec: ReplicaSpec) -> bool:
    """DP attention shares the tensor-parallel GPUs; plain data parallelism multiplies them."""
    return given(spec.args, "--enable-dp-attention", "--attn-dp-size")


def _can_sleep(spec: ReplicaSpec) -> bool:
    """What is to be dumped has to let go of its memory before."""
    return spec.sleep or spec.snapshot


def _keeps_weights(spec: ReplicaSpec) -> bool:
    """Say whether it copies the weights to host memory when it sleeps.

    For an image that would be so much ballast: what can be read from the disk again is not copied.
    A draft is not read again, nor are adapters.
    """
    again = reads_weights(spec.args) and not spec.adapters
    return not spec.snapshot or not again or given(spec.args, *_DRAFT_FLAGS)


def _sleep_flags(spec: ReplicaSpec) -> tuple[str, ...]:
    """Weights outlive a release only by the copies that these make.

    Those of a draft, too, which need not be named: NEXTN drafts with layers of the model's own.
    """
    if not _can_sleep(spec):
        return ()
    drafts = given(spec.args, *_DRAFT_FLAGS)
    draft = ("--enable-draft-weights-cpu-backup",) if drafts else ()
    copies = ("--enable-weights-cpu-backup", *draft) if _keeps_weights(spec) else ()
    return ("--enable-memory-saver", *copies)


def _lora_flags(spec: ReplicaSpec) -> tuple[str, ...]:
    if not spec.adapters:
        return ()
    return ("--enable-lora", "--lora-paths", *(f"{n}={p}" for n, p in spec.adapters.items()))
