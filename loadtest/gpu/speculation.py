"""What an engine says of its speculative decoding and of the size of its weights.

vLLM counts drafts, proposed and accepted tokens; SGLang shows the mean acceptance length of its
last batches as a gauge, and in its log. An acceptance length counts the token that each step yields
anyhow, so a head that is never right has 1.
"""

from __future__ import annotations

import re

import msgspec

_SAMPLE = re.compile(r"^((?:vllm|sglang):spec_[a-z_]+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
_LOGGED_LENGTH = re.compile(r"accept len: ([0-9.]+)")
_WEIGHTS = (
    re.compile(r"Model loading took ([0-9.]+) GiB"),  # vLLM 0.26
    re.compile(r"Load weight end\..*?mem usage=([0-9.]+) GB"),  # SGLang 0.5.17: of the target
)


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a run; SGLang does not tell how many tokens were proposed in all."""

    draft_tokens: float = 0.0
    accepted_tokens: float = 0.0
    accept_length: float = 0.0

    @property
    def drafted(self) -> bool:
        """Whether any token was proposed."""
        return self.draft_tokens > 0 and self.accept_length >= 1

    @property
    def text(self) -> str:
        """Return it for people."""
        return f"{self.draft_tokens:,.0f} drafted, length {self.accept_length:.2f}"


def read_speculation(metrics: str, log: str) -> Speculation:
    """Return what the metrics, or else the log, tell of speculation."""
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(metrics):
        sums[name] = sums.get(name, 0.0) + float(value)
    drafts = sums.get("vllm:spec_decode_num_drafts_total", 0.0)
    if drafts:
        accepted = sums.get("vllm:spec_decode_num_accepted_tokens_total", 0.0)
        return Speculation(
            draft_tokens=sums.get("vllm:spec_decode_num_draft_tokens_total", 0.0),
            accepted_tokens=accepted,
            accept_length=1 + accepted / drafts,
        )
    logged = _LOGGED_LENGTH.findall(log)
    length = sums.get("sglang:spec_accept_length", 0.0) or float(logged[-1] if logged else 0.0)
    # Of each step; shown as soon as there is a draft model.
    proposed = sums.get("sglang:spec_num_draft_tokens", 0.0) or (1.0 if logged else 0.0)
    return Speculation(draft_tokens=proposed, accept_length=length)


def weights_gb(log: str) -> float:
    """Return the size of the weights on one card as the engine logs it; 0 when it does not."""
    for pattern in _WEIGHTS:
        found = pattern.search(log)
        if found:
            return float(found[1])
    return 0.0
