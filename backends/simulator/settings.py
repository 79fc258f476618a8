"""What one simulated engine is told at its start; everything derived from flags in `app`."""

from __future__ import annotations

from typing import Literal

import msgspec

from backends.simulator.kv_events import Dialect, Endpoint
from backends.simulator.profiles import PROFILES, Profile

CHAT_TOKENS_DEFAULT = 256  # an answer without max_tokens, where an engine would fill the context
COMPLETION_TOKENS_DEFAULT = 16
BODY_BYTES_MAX = 32 * 1024 * 1024
VERSIONS: dict[Dialect, str] = {"vllm": "0.33.0", "sglang": "0.5.23"}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Durations ending in `_s` are of the simulated machine unless a comment says otherwise."""

    host: str = "127.0.0.1"
    port: int = 0
    models: tuple[str, ...] = ("demo",)  # names of the one model
    adapters: tuple[str, ...] = ()  # LoRA names, each a model name with a prefix cache of its own
    lora_updates: bool = False  # whether adapters come and go at run time
    dialect: Dialect = "vllm"
    task: Literal["generate", "embed"] = "generate"
    profile: Profile = PROFILES["h200-8b"]
    time_scale: float = 1.0
    block_tokens: int = 16
    kv_cache_tokens: int = 0  # 0: the profile's
    dp_size: int = 1  # data-parallel ranks, each with such a cache
    sequences_max: int = 1024
    batched_tokens_max: int = 8192
    model_tokens_max: int = 0  # 0: the profile's
    stream_interval: int = 1
    priorities: bool = False
    low_priority_first: bool = False  # SGLang's switch to vLLM's direction
    mean_output_tokens: float = 0.0
    seed: int = 0
    sleep_mode: bool = False
    load_tracking: bool = False
    echo_request_id: bool = False
    health_generation: bool = False
    header_overrides: bool = False  # SGLang's x-override-rid names a chat request
    notice_s: float = 0.0  # until it is seen that a client has left before its answer began
    api_keys: tuple[str, ...] = ()
    kv_events: Endpoint | None = None
    startup_s: float = 0.0
    tables_mib: int = 0  # built by real work before it serves, see `tables`
    shutdown_timeout_s: float = 0.0  # real seconds, as an operator means them
    drain_poll_s: float = 5.0
    keep_alive_timeout_s: float = 5.0  # real seconds
    faults: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The engine release whose manners these are."""
        return VERSIONS[self.dialect]

    @property
    def context_tokens_max(self) -> int:
        """Prompt and answer together."""
        return self.model_tokens_max or self.profile.max_model_len

    @property
    def kv_blocks_max(self) -> int:
        """Size of the pool."""
        return (self.kv_cache_tokens or self.profile.kv_cache_tokens) // self.block_tokens

    def rank(self, priority: int) -> int:
        """Return the scheduling rank of a request's priority: lower goes first."""
        if not self.priorities:
            return 0
        higher_first = self.dialect == "sglang" and not self.low_priority_first
        return -priority if higher_first else priority

    def real_s(self, simulated_s: float) -> float:
        """Return how long a simulated duration takes here."""
        return simulated_s / self.time_scale
