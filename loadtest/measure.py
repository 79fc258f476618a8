"""What was seen of each request, and the figures that follow from it.

Every figure is made of requests after the warm-up, failed ones counted apart: a failure has no time
to first token, and leaving it out in silence would flatter who fails. Times run from the moment a
request was sent; how late the client itself was is a figure of its own, by which the others are to
be judged.

Pure: values in, values out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

UNKNOWN_REPLICA = "unknown"


class Outcome(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request, as the client saw it. Times are in seconds since the replay began."""

    index: int  # place in the order of sending
    scheduled_s: float
    sent_s: float
    ended_s: float
    first_content_s: float = 0.0  # 0: none came
    last_content_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int | None = None  # None: the server does not say
    output_tokens: int = 0
    replica: str = UNKNOWN_REPLICA
    error: str = ""  # a word to count by; empty: a whole answer came
    detail: str = ""

    @property
    def lateness_s(self) -> float:
        return max(0.0, self.sent_s - self.scheduled_s)  # timers may be early by half a millisecond

    @property
    def ttft_s(self) -> float | None:
        return self.first_content_s - self.sent_s if self.first_content_s else None

    @property
    def tpot_s(self) -> float | None:
        """Return the time per output token after the first; None where there is no second."""
        if self.output_tokens < 2 or self.last_content_s <= self.first_content_s:
            return None
        return (self.last_content_s - self.first_content_s) / (self.output_tokens - 1)


class ReplicaFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica got."""

    requests: int
    request_share: float
    prompt_tokens: int
    prompt_token_share: float
    work_tokens: int  # prompt tokens that it had to compute, not being cached


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a replay. None: nothing to measure it by."""

    requests: int
    succeeded: int
    errors: dict[str, int]
    error_example: str
    warmup_requests: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int | None
    hit_rate: float | None
    hit_rate_bound: float | None  # of one endless cache
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    total_p50_s: float | None
    total_p99_s: float | None
    output_tokens: int
    output_tokens_per_s: float
    replicas: dict[str, ReplicaFigures]
    work_max_over_mean: float | None
    lateness_p99_s: float | None
    lateness_max_s: float | None
    client_cpu_share: float | None = None  # of one core, over the replay


class Spread(msgspec.Struct, frozen=True):
    """The middle of repeated measurements, and how far they lie apart."""

    median: float
    low: float
    high: float


def quantile(values: Iterable[float], share: float) -> float | None:
    """Return the smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> Spread | None:
    """Return median (mean of the middle two), least and greatest; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Spread(median, ordered[0], ordered[-1])


def warmup_count(text: str, request_count: int) -> int:
    """Return how many requests `--warmup TEXT` leaves out: a number, a fraction or a percentage.

    Raises `ValueError` saying what may be written.
    """
    problem = f"warm-up {text!r}: expected a number of requests, or a share such as 0.1 or 10%"
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise ValueError(problem) from error
    if not 0 <= value < math.inf or (value >= 1 and (value % 1 or text.endswith("%"))):
        raise ValueError(problem)
    return int(value) if value >= 1 else int(value * request_count)


def summarise(
    outcomes: Iterable[Outcome],
    warmup_requests: int,
    *,
    hit_rate_bound: float | None = None,
    replica_count: int = 0,
) -> Summary:
    """Return the figures of the requests from place `warmup_requests` on.

    `replica_count` is how many replicas there are, where that is known: one that got nothing does
    not show in the answers, and counts in the mean.
    """
    measured = sorted((o for o in outcomes if o.index >= warmup_requests), key=lambda o: o.index)
    good = [o for o in measured if not o.error]
    failed = [o for o in measured if o.error]
    errors = Counter(o.error for o in failed)
    start_s = min((o.sent_s for o in measured), default=0.0)
    duration_s = max((o.ended_s for o in measured), default=0.0) - start_s
    prompt_tokens = sum(o.prompt_tokens for o in good)
    known = [o.cached_tokens for o in good if o.cached_tokens is not None]
    cached_tokens = sum(known) if known else None
    output_tokens = sum(o.output_tokens for o in good)
    replicas = by_replica(good)
    most = errors.most_common(1)[0][0] if errors else ""

    def over(figure: Callable[[Outcome], float | None], share: float) -> float | None:
        return quantile((v for o in good if (v := figure(o)) is not None), share)

    return Summary(
        requests=len(measured),
        succeeded=len(good),
        errors=dict(errors.most_common()),
        error_example=next((o.detail for o in failed if o.error == most and o.detail), ""),
        warmup_requests=warmup_requests,
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        hit_rate=None if cached_tokens is None else cached_tokens / max(1, prompt_tokens),
        hit_rate_bound=hit_rate_bound,
        ttft_p50_s=over(lambda o: o.ttft_s, 0.5),
        ttft_p95_s=over(lambda o: o.ttft_s, 0.95),
        ttft_p99_s=over(lambda o: o.ttft_s, 0.99),
        tpot_p50_s=over(lambda o: o.tpot_s, 0.5),
        tpot_p99_s=over(lambda o: o.tpot_s, 0.99),
        total_p50_s=over(lambda o: o.ended_s - o.sent_s, 0.5),
        total_p99_s=over(lambda o: o.ended_s - o.sent_s, 0.99),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration_s if duration_s > 0 else 0.0,
        replicas=replicas,
        work_max_over_mean=_max_over_mean(replicas, replica_count),
        lateness_p99_s=quantile((o.lateness_s for o in measured), 0.99),
        lateness_max_s=max((o.lateness_s for o in measured), default=None),
    )


def by_replica(outcomes: Sequence[Outcome]) -> dict[str, ReplicaFigures]:
    """Return what each replica got, by name."""
    names = sorted({o.replica for o in outcomes})
    prompt_tokens = max(1, sum(o.prompt_tokens for o in outcomes))
    figures = {}
    for name in names:
        own = [o for o in outcomes if o.replica == name]
        own_tokens = sum(o.prompt_tokens for o in own)
        figures[name] = ReplicaFigures(
            requests=len(own),
            request_share=len(own) / len(outcomes),
            prompt_tokens=own_tokens,
            prompt_token_share=own_tokens / prompt_tokens,
            work_tokens=own_tokens - sum(o.cached_tokens or 0 for o in own),
        )
    return figures


def _max_over_mean(replicas: dict[str, ReplicaFigures], replica_count: int) -> float | None:
    work = [figures.work_tokens for name, figures in replicas.items() if name != UNKNOWN_REPLICA]
    count = max(len(work), replica_count)
    return max(work) * count / sum(work) if sum(work) > 0 else None


class Interval(msgspec.Struct, frozen=True):
    """A piece of the replay: when, and the figures of the requests sent in it."""

    at_s: float  # its middle
    ttft_p50_s: float | None
    hit_rate: float | None


def intervals(outcomes: Iterable[Outcome], count: int) -> list[Interval]:
    """Cut the replay into `count` equal pieces of time; pieces without requests are left out."""
    good = [o for o in outcomes if not o.error]
    if not good:
        return []
    start_s = min(o.sent_s for o in good)
    width_s = (max(o.sent_s for o in good) - start_s) / count or 1.0
    pieces: list[list[Outcome]] = [[] for _ in range(count)]
    for outcome in good:
        pieces[min(count - 1, int((outcome.sent_s - start_s) / width_s))].append(outcome)
    return [
        Interval(
            at_s=start_s + (place + 0.5) * width_s,
            ttft_p50_s=quantile((o.ttft_s for o in piece if o.ttft_s is not None), 0.5),
            hit_rate=_hit_rate(piece),
        )
        for place, piece in enumerate(pieces)
        if piece
    ]


def _hit_rate(outcomes: Sequence[Outcome]) -> float | None:
    known = [o.cached_tokens for o in outcomes if o.cached_tokens is not None]
    return sum(known) / max(1, sum(o.prompt_tokens for o in outcomes)) if known else None
