"""How each engine behaves where a manager or a proxy must act differently, as one row a fact.

What differs between releases is in `features`; what is here holds for all that are supported. The
commands of this package are presumed: with another scheduling policy, say, the priority has no
direction at all. Sources are named by their path in the engine's package.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from proxy.config import Serves


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """One engine."""

    # Answered at once and without computing, while it sleeps too.
    alive_path: str
    # Ready when the first of these that is not 404 says 200.
    ready_paths: tuple[str, ...]
    # Whether that also says no while it is paused, asleep or on its way down.
    ready_tells_rest: bool
    # Whether requests are routed to it, or it gets lines of jobs from the desk and, told to end,
    # gives back what it has not done.
    serves: Serves
    # Computes a token: fatal, or unanswered, while it sleeps.
    generating_paths: tuple[str, ...]
    # Where to post that everything is to end, and the body; none: SIGTERM does it in bounded time.
    abort_path: str | None
    abort_body: bytes
    # What a number in a request's `priority` means as we start it.
    lower_priority_first: bool
    # Where a request's own id is read, and whether an answer carries it back.
    request_id: tuple[Literal["header", "body"], str]
    echoes_request_id: bool
    # The data-parallel rank that a request is pinned to.
    rank_header: str
    # {"error": {...}}, or the same fields at the top.
    error_shape: Literal["nested", "flat"]
    # Whether adapters come and go by calls.
    adapters_at_run_time: bool
    # Whether its prefix cache knows an adapter by its name, so that other weights need another.
    adapter_names_once: bool


VLLM: Final = Facts(
    alive_path="/health",  # entrypoints/serve: 503 only when the engine is dead
    ready_paths=("/health",),
    ready_tells_rest=False,
    serves="requests",
    generating_paths=(),
    abort_path=None,  # --shutdown-timeout bounds its drain (entrypoints/launchers/launcher.py)
    abort_body=b"",
    lower_priority_first=True,
    request_id=("header", "X-Request-Id"),
    echoes_request_id=True,  # with --enable-request-id-headers
    rank_header="X-data-parallel-rank",
    error_shape="nested",
    adapters_at_run_time=True,
    adapter_names_once=True,  # v1/core/kv_cache_utils.py: its block hashes have the name in them
)
SGLANG: Final = Facts(
    alive_path="/ping",
    ready_paths=("/ready", "/health"),  # releases before 0.5.20 lack /ready
    ready_tells_rest=True,
    serves="requests",
    generating_paths=("/health_generate",),  # the environment keeps /health from it, not this one
    abort_path="/abort_request",  # after SIGTERM it waits without limit (tokenizer_manager.py)
    abort_body=b'{"abort_all":true}',
    lower_priority_first=True,  # with --schedule-low-priority-values-first
    request_id=("body", "rid"),
    echoes_request_id=False,
    rank_header="X-Data-Parallel-Rank",
    error_shape="flat",
    adapters_at_run_time=True,
    adapter_names_once=False,  # srt/lora/lora_registry.py: a new id for each load
)
