"""The bounds: in relation to each other, and each with a reason beside it."""

from __future__ import annotations

import ast
from pathlib import Path

from proxy.core import claim_limits, limits

_SOURCE = Path(__file__).parents[2].joinpath("proxy/core/limits.py").read_text(encoding="utf-8")
_UNITS = (
    "_BYTES", "_BYTES_MAX", "_S", "_S_MAX", "_MAX", "_DIGITS_MAX", "_TOKENS_DEFAULT",
    "_PER_S_DEFAULT", "_FIRST_S", "_WEIGHT", "_NODES", "_PER_TOKEN", "_SLACK_S", "_SHARE",
    "_SHARE_MIN", "_SHARE_MAX", "_BAND", "_TOKENS", "_PER_CACHE", "_PRICE_S", "_COUNT_MIN",
    "RATIO_MIN", "_PAUSE_S", "_PARTS",
    "_S_MIN",
)  # fmt: skip


def _numbers() -> dict[str, float]:
    named = vars(limits) | vars(claim_limits)
    return {name: value for name, value in named.items() if name.isupper()}


def test_every_bound_is_a_positive_number_with_its_unit() -> None:
    for name, value in _numbers().items():
        assert isinstance(value, int | float), name
        assert value > 0, name
        assert name in ("KIB", "MIB") or name.endswith(_UNITS), name


def test_bounds_fit_each_other() -> None:
    assert limits.TARGET_BYTES_MAX < limits.HEAD_BYTES_MAX
    # A followed size line may hold every extension that a decoder takes.
    assert limits.CHUNK_EXTENSION_BYTES_MAX < limits.TRAILER_BYTES_MAX
    assert limits.CHUNK_SIZE_DIGITS_MAX <= 16  # 64 bits
    assert limits.MODEL_BYTES_MAX < limits.USAGE_TAIL_BYTES
    assert limits.CHAIN_FIRST_BYTES % 64 == 0
    assert limits.HEAD_TIMEOUT_S < limits.CLIENT_KEEP_ALIVE_S
    assert limits.SWEEP_INTERVAL_S < limits.LINGER_S
    # We close an idle connection, sweep included, before vLLM does after 5 s.
    assert limits.UPSTREAM_IDLE_S_MAX + limits.SWEEP_INTERVAL_S < 5.0


def test_every_relation_is_asserted_at_import() -> None:
    """The module checks itself where it is loaded, not only here."""
    assert any(isinstance(node, ast.Assert) for node in ast.parse(_SOURCE).body)
