"""What a worker counts, and the page that shows it."""

from __future__ import annotations

from collections import deque

from backends.metric_lists import ENGINE_WORKER, ENGINE_WORKER_PREFIX
from backends.offline.line_engine import Gauges
from backends.offline.work import Result

RATE_S = 10.0  # over which tokens a second are counted


class Meters:
    """Counters of one worker; times are seconds of a clock that only goes on."""

    def __init__(self) -> None:
        self.lines = {"done": 0, "failed": 0, "given_back": 0, "lost": 0}
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.busy_s = 0.0  # GPU-seconds with lines in hand
        self.desk_failures = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_tokens = 0
        self._busy_since_s: float | None = None
        self._untold_busy_s = 0.0

    def finish(self, result: Result, now_s: float) -> None:
        """Count a result."""
        self.lines["done" if result.status < 400 else "failed"] += 1
        self.prompt_tokens += result.prompt_tokens
        self.cached_tokens += result.cached_tokens
        self.completion_tokens += result.completion_tokens
        tokens = result.prompt_tokens + result.completion_tokens
        if self._recent and now_s - self._recent[-1][0] < RATE_S / 100:  # a bounded table
            at_s, before = self._recent.pop()
            self._recent.append((at_s, before + tokens))
        else:
            self._recent.append((now_s, tokens))
        self._recent_tokens += tokens

    def tokens_per_s(self, now_s: float) -> float:
        """Return prompt and answer tokens a second of what finished lately."""
        while self._recent and self._recent[0][0] < now_s - RATE_S:
            self._recent_tokens -= self._recent.popleft()[1]
        if not self._recent:
            return 0.0
        return self._recent_tokens / max(1.0, min(RATE_S, now_s - self._recent[0][0]))

    def note_busy(self, *, busy: bool, gpus: int, now_s: float) -> None:
        """Note whether lines are in hand from now on."""
        if self._busy_since_s is not None:
            passed_s = (now_s - self._busy_since_s) * gpus
            self.busy_s += passed_s
            self._untold_busy_s += passed_s
        self._busy_since_s = now_s if busy else None

    def take_busy_s(self) -> float:
        """Return the GPU-seconds that no report has told yet."""
        busy_s, self._untold_busy_s = self._untold_busy_s, 0.0
        return busy_s

    def untake_busy_s(self, busy_s: float) -> None:
        """Take back what was not told after all."""
        self._untold_busy_s += busy_s


def render(meters: Meters, gauges: Gauges, chunks: int, now_s: float) -> str:
    """Return the page of /metrics."""
    rows: list[tuple[str, str, float]] = [
        ("lines_total", f'{{outcome="{outcome}"}}', count)
        for outcome, count in meters.lines.items()
    ]
    rows += [
        ("prompt_tokens_total", "", meters.prompt_tokens),
        ("cached_tokens_total", "", meters.cached_tokens),
        ("completion_tokens_total", "", meters.completion_tokens),
        ("busy_gpu_seconds_total", "", meters.busy_s),
        ("desk_failures_total", "", meters.desk_failures),
        ("tokens_per_second", "", meters.tokens_per_s(now_s)),
        ("lines_waiting", "", gauges.waiting),
        ("lines_running", "", gauges.running),
        ("chunks_held", "", chunks),
    ]
    if gauges.kv_usage is not None:
        rows.append(("kv_cache_usage_ratio", "", gauges.kv_usage))
    lines = []
    typed = set()
    for name, labels, value in rows:
        full, family = ENGINE_WORKER_PREFIX + name, ENGINE_WORKER[name]
        if name not in typed:
            typed.add(name)
            lines += [f"# HELP {full} {family.text}.", f"# TYPE {full} {family.kind}"]
        lines.append(f"{full}{labels} {value:.10g}")
    return "\n".join(lines) + "\n"
