"""What is asked of a plan: the class of the work, its sizes, its targets.

Where nothing is said, these defaults hold. They are choices, not measurements: an online answer
should begin within the Doherty threshold of 400 ms (Doherty and Thadhani, 1982), and forty tokens,
a tool call or a line of code, take half of that; semi-online work has nobody waiting for single
tokens; offline work has no target but its cost. `doherty plan` has a flag for each.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from backends.planning.calibration import EngineName

WorkClass = Literal["online", "offline", "semi-online"]


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """One question to the planner."""

    model: str  # a folder or a hub id, as it was given
    work: WorkClass
    gpus_per_node: int = 8
    prompt_tokens: int = 2048
    answer_tokens: int = 256
    context_tokens: int = 0  # longest sequence to serve; 0: as long as the model and memory allow
    concurrency: int  # requests in flight on a replica at which the targets must hold
    token_target_s: float | None = None  # time per token
    first_token_target_s: float | None = None
    engine: EngineName | None = None
    draft: str = ""  # "": as the class has it; "auto": one that is known; "none": no speculation
    accept_length: float = 0.0  # 0: as published for the draft
    kv_fp8: bool = False
    as_shipped: bool = False  # leave the weights in the checkpoint's format
    prices_per_hour: dict[str, float] = {}  # of one GPU of each type, in any currency

    @property
    def sequence_tokens(self) -> int:
        """Return the length of a request at its end."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def decode_context_tokens(self) -> float:
        """Return the mean length of a request while it decodes."""
        return self.prompt_tokens + self.answer_tokens / 2


class Targets(msgspec.Struct, frozen=True):
    token_s: float | None
    first_token_s: float | None
    concurrency: int


DEFAULT_TARGETS: dict[WorkClass, Targets] = {
    "online": Targets(0.005, 0.400, 8),
    "semi-online": Targets(0.050, 5.0, 32),
    "offline": Targets(None, None, 1),
}


class Decision(msgspec.Struct, frozen=True):
    """One choice, the rule that made it, and why."""

    rule: str
    choice: str
    why: str
