"""How fast workers are, from what they reported in the last minute."""

from __future__ import annotations

WINDOW_S = 60.0
_WORKERS_MAX = 10_000


class Rates:
    """Tokens of each worker in six buckets of ten seconds."""

    def __init__(self) -> None:
        self._tokens: dict[str, dict[int, int]] = {}  # by worker and bucket

    def count(self, worker_id: str, now_s: float, tokens: int) -> None:
        """Add what a worker did."""
        if worker_id not in self._tokens and len(self._tokens) >= _WORKERS_MAX:
            self._drop_silent(now_s)
            if len(self._tokens) >= _WORKERS_MAX:
                return
        buckets = self._tokens.setdefault(worker_id, {})
        bucket = int(now_s // _BUCKET_S)
        buckets[bucket] = buckets.get(bucket, 0) + tokens
        for old in [key for key in buckets if key <= bucket - _BUCKETS]:
            del buckets[old]

    def per_worker(self, now_s: float) -> dict[str, float]:
        """Return tokens a second by worker id, over the time in which it reported."""
        self._drop_silent(now_s)
        rates = {}
        for worker_id, buckets in self._tokens.items():
            # It may have begun within the window.
            since_s = max(min(buckets) * _BUCKET_S, now_s - WINDOW_S)
            rates[worker_id] = sum(buckets.values()) / max(_BUCKET_S, now_s - since_s)
        return rates

    def _drop_silent(self, now_s: float) -> None:
        oldest = int(now_s // _BUCKET_S) - _BUCKETS
        for worker_id in list(self._tokens):
            buckets = self._tokens[worker_id]
            for old in [key for key in buckets if key <= oldest]:
                del buckets[old]
            if not buckets:
                del self._tokens[worker_id]


_BUCKET_S = 10.0
_BUCKETS = int(WINDOW_S / _BUCKET_S)
