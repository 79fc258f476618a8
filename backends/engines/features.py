"""Which release of an engine has what, where releases differ in a way that Doherty must know.

One row is one difference: the first release that has it and, when it went away, the last. Where the
release in between was not read, the row names the first one that was read and has it, so that a
release is trusted with less than it has and never with more.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from backends.engines.release import UNKNOWN_RELEASE, Release


class Span(NamedTuple):
    """The releases that have a feature; `until` is the last of them."""

    since: Release
    until: Release | None
    what: str


class Range(NamedTuple):
    """The releases that Doherty is made for."""

    oldest: Release
    newest: Release


def _since(major: int, minor: int, patch: int, what: str) -> Span:
    return Span(Release(major, minor, patch), None, what)


VLLM_RANGE: Final = Range(Release(0, 23), Release(0, 33))
SGLANG_RANGE: Final = Range(Release(0, 5, 10), Release(0, 5, 23))

VLLM: Final[Mapping[str, Span]] = MappingProxyType(
    {
        "kv_event_maps": _since(0, 26, 0, "events are maps; arrays before"),
        "kv_replay_topic": _since(0, 26, 0, "the topic is a frame of replay answers too"),
        "startup_plan": _since(0, 27, 1, "VLLM_ENABLE_STARTUP_PLAN skips the memory profiling"),
        "fixed_root_hash": _since(0, 30, 0, "block hashes agree without PYTHONHASHSEED"),
        "queue_limits": _since(0, 30, 0, "--max-num-queued-reqs and --max-num-queued-tokens"),
        "priority_header": _since(0, 30, 0, "X-Vllm-Priority, over the priority in the body"),
        "sse_keep_alive": _since(0, 30, 0, "--sse-keep-alive-interval"),
        "kv_event_sources": _since(0, 32, 0, "/kv_event_sources tells where the events are"),
        "release_kv_cache": _since(0, 32, 0, "/release_kv_cache_memory after a sleep of level 0"),
        "refuses_asleep": _since(0, 33, 0, "503 to requests while asleep; they hang before"),
    }
)
SGLANG: Final[Mapping[str, Span]] = MappingProxyType(
    {
        "kv_events_by_rank": _since(0, 5, 15, "ranks of plain DP or PP have event ports apart"),
        "kv_events_in_info": _since(0, 5, 15, "/server_info tells where the events are"),
        "weight_cache": _since(0, 5, 17, "--weight-cache-mode, which excludes the memory saver"),
        "kv_event_maps": _since(0, 5, 20, "events are maps; arrays before"),
        # 0.5.17 takes them at /generate alone; none was read between.
        "chat_overrides": _since(0, 5, 20, "x-override-rid at /v1/chat/completions"),
        "ready_path": _since(0, 5, 20, "/ready says whether it would serve"),
        "load_socket": _since(0, 5, 20, "--load-publish-endpoint"),
        "gated_launch": _since(0, 5, 20, "--gated-launch-port"),
        "kv_replay_topic": _since(0, 5, 22, "the topic is a frame of replay answers too"),
        "kv_bind": _since(0, 5, 22, "`bind` in --kv-events-config"),
        "get_load": Span(Release(0, 5, 10), Release(0, 5, 20), "/get_load, deprecated"),
        "cuda_graph_max_bs": Span(
            Release(0, 5, 10), Release(0, 5, 17), "--cuda-graph-max-bs; an ambiguous prefix since"
        ),
    }
)


def has(features: Mapping[str, Span], name: str, release: Release) -> bool:
    """Say whether `release` surely has the feature. An unknown one has what every one has."""
    span = features[name]
    if release == UNKNOWN_RELEASE:
        return False
    return span.since <= release and (span.until is None or release <= span.until)
