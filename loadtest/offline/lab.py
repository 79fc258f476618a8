"""The gate of spare capacity in virtual time: what its lines cost others, without clocks' noise.

Replicas are the simulator's scheduler and step times (`backends.simulator.clockwork`); the gate is
the one that runs (`backends.offline.gate`), and it hears what it hears in a region: the proxies'
counts of half a second ago at most, the engines' readings once a second. Online requests arrive at
random (Poisson, seeded), go where fewest of them are, and share nothing; lines wait without end and
go as the gate lets them in. Told with and without lines: time to the first token, time between
tokens, tokens of lines a second.

    python -m loadtest offline lab
    python -m loadtest offline lab --rates 2,8,16 --burst 6 --priority
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
from collections.abc import Callable

import msgspec

from backends.offline.gate import Gate, ReplicaSeen, Seen, Verdict
from backends.offline.holds import Pace
from backends.simulator.clockwork import Clockwork, Limits, Sequence, Step
from backends.simulator.kv_cache import KvCache
from backends.simulator.profiles import PROFILES
from backends.simulator.tally import Tally
from backends.simulator.tokens import WordSource
from loadtest.measure import quantile
from proxy.contract import LoadSample

SUMMARY = "the gate of spare capacity in virtual time, at several rates of online requests"
LOOK_S = 0.5
READING_S = 1.0
BLOCK_TOKENS = 16
BATCHED_TOKENS = 8192
LINES_EACH_MAX = 64
HEAD = "rate      lines   requests  TTFT p50     p99  gap p50    p99  line tokens/s  lines   cut"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one set of replicas. Ranges are uniform, both ends included."""

    rate: float = 8.0  # online requests a second, over all replicas
    replicas: int = 2
    seconds: float = 120.0
    before: float = 30.0
    online_prompt: tuple[int, int] = (50, 1500)
    online_answer: tuple[int, int] = (50, 300)
    line_prompt: tuple[int, int] = (50, 350)
    line_answer: tuple[int, int] = (32, 224)
    profile: str = "h200-8b"
    priority: bool = False  # the engines compute online requests first
    burst: float = 1.0  # times the rate, for `burst_s` in the middle
    burst_s: float = 10.0
    seed: int = 1


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one run."""

    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    line_tokens_per_s: float
    lines: int
    cut: int


class _Replica:
    """One engine, and what is on it."""

    def __init__(self, setting: Setting, name: str) -> None:
        profile = PROFILES[setting.profile]
        cache = KvCache(profile.kv_cache_tokens // BLOCK_TOKENS, BLOCK_TOKENS)
        limits = Limits(256, BATCHED_TOKENS, profile.max_model_len)
        self.name = name
        self.tally = Tally()
        self.cache = cache
        self.engine = Clockwork(profile, cache, limits, self.tally)
        self.stepping = False
        self.counts = [0, 0]  # in flight: online requests, lines
        self.generated = 0

    def reading(self, now_s: float) -> LoadSample:
        return LoadSample(
            at_s=now_s,
            running=len(self.engine.running),
            waiting=self.engine.waiting_count,
            kv_used_ratio=self.cache.used_blocks / self.cache.blocks_max,
            generation_tokens_total=self.generated,
            preemptions_total=self.tally.preemptions,
            prefill_tokens_total=self.tally.computed_tokens,
            prefill_busy_s_total=self.tally.prefill_busy_s,
        )


class Lab:
    """One run."""

    def __init__(self, setting: Setting, *, lines: bool) -> None:
        self.setting = setting
        self._draw, self._line_draw = random.Random(setting.seed), random.Random(setting.seed + 1)
        self._replicas = [_Replica(setting, f"r{n}") for n in range(setting.replicas)]
        self._gate = Gate(LINES_EACH_MAX) if lines else None
        self._verdict, self._pace = Verdict(lines=0, keep=0), Pace()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = itertools.count()
        self._place: dict[Sequence, _Replica] = {}
        self._lines: dict[Sequence, None] = {}  # the youngest last
        self._loads: list[LoadSample] = []
        self._arrivals = self._online = 0
        self._told: tuple[int, int] = (0, 0)
        self.waits_s: list[float] = []
        self.gaps_s: list[float] = []
        self.line_tokens = self.lines_done = self.cut = 0

    def run(self) -> Finding:
        setting = self.setting
        self._at(self._draw.expovariate(setting.rate), self._arrive)
        if self._gate is not None:
            self._at(0.0, self._read)
            self._at(0.01, self._look)
        end_s = setting.before + setting.seconds
        while self._events and self._events[0][0] <= end_s:
            at_s, _, do = heapq.heappop(self._events)
            do(at_s)
        return Finding(
            requests=len(self.waits_s),
            ttft_p50_s=quantile(self.waits_s, 0.5) or 0.0,
            ttft_p99_s=quantile(self.waits_s, 0.99) or 0.0,
            gap_p50_s=quantile(self.gaps_s, 0.5) or 0.0,
            gap_p99_s=quantile(self.gaps_s, 0.99) or 0.0,
            line_tokens_per_s=self.line_tokens / setting.seconds,
            lines=self.lines_done,
            cut=self.cut,
        )

    def _at(self, at_s: float, do: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._count), do))

    # --- requests ---------------------------------------------------------------------------------

    def _arrive(self, now_s: float) -> None:
        setting = self.setting
        self._arrivals += 1
        self._online += 1
        sequence = self._made(self._draw, setting.online_prompt, setting.online_answer)
        self._submit(sequence, now_s)
        middle_s = setting.before + setting.seconds / 2
        bursts = middle_s <= now_s < middle_s + setting.burst_s
        rate = setting.rate * (setting.burst if bursts else 1.0)
        self._at(now_s + self._draw.expovariate(rate), self._arrive)

    def _made(
        self, draw: random.Random, prompt: tuple[int, int], answer: tuple[int, int]
    ) -> Sequence:
        head = b"%07d " % draw.randrange(10**7)  # four octets a token; this is two
        text = head + b"word" * max(0, draw.randint(*prompt) - 2)
        words = WordSource(head, 0)
        return Sequence(text, max_tokens=draw.randint(*answer), words=words)

    def _submit(self, sequence: Sequence, now_s: float) -> None:
        is_line = sequence in self._lines
        replica = min(self._replicas, key=lambda each: each.counts[is_line])
        replica.counts[is_line] += 1
        self._place[sequence] = replica
        replica.engine.submit(sequence, now_s)
        self._step(replica, now_s)

    def _step(self, replica: _Replica, now_s: float) -> None:
        if replica.stepping:
            return
        replica.engine.reap()
        ready_s = replica.engine.next_ready_s(now_s)
        if ready_s is None:
            return
        if ready_s > now_s:
            self._at(ready_s, lambda at_s: self._step(replica, at_s))
            return
        step = replica.engine.plan(now_s)
        if step is not None:
            replica.stepping = True
            self._at(step.end_s, lambda at_s: self._stepped(replica, step, at_s))

    def _stepped(self, replica: _Replica, step: Step, now_s: float) -> None:
        replica.stepping = False
        before = {sequence: sequence.last_token_s for sequence, _ in step.work}
        for emission in replica.engine.finish(step):
            sequence = emission.sequence
            replica.generated += 1
            if sequence not in self._place:
                continue  # it was cut within this step
            if sequence not in self._lines:
                self._note(sequence, before.get(sequence, 0.0), now_s)
            if emission.finish_reason:
                self._ended(sequence, now_s)
        self._step(replica, now_s)

    def _note(self, sequence: Sequence, last_s: float, now_s: float) -> None:
        if sequence.submitted_s < self.setting.before:
            return
        if sequence.generated_tokens == 1:
            self.waits_s.append(now_s - sequence.submitted_s)
        else:
            self.gaps_s.append(now_s - last_s)

    def _ended(self, sequence: Sequence, now_s: float) -> None:
        self._place.pop(sequence).counts[sequence in self._lines] -= 1
        if sequence in self._lines:
            del self._lines[sequence]
            if now_s >= self.setting.before:
                self.line_tokens += sequence.total_tokens
                self.lines_done += 1
            self._fill(now_s)
        else:
            self._online -= 1

    # --- lines ------------------------------------------------------------------------------------

    def _read(self, now_s: float) -> None:
        self._loads = [replica.reading(now_s) for replica in self._replicas]
        self._at(now_s + READING_S, self._read)

    def _look(self, now_s: float) -> None:
        assert self._gate is not None
        in_flight, arrivals = self._told  # what proxies told before this
        self._told = (self._online, self._arrivals)
        replicas = tuple(
            ReplicaSeen(replica_id=replica.name, load=load)
            for replica, load in zip(self._replicas, self._loads, strict=True)
        )
        seen = Seen(
            at_s=now_s,
            replicas=replicas,
            others_in_flight=in_flight,
            others_arrivals_total=arrivals,
            lines=len(self._lines),
        )
        self._verdict = self._gate.decide(seen)
        for sequence in list(reversed(self._lines))[: len(self._lines) - self._verdict.keep]:
            replica = self._place.pop(sequence)
            replica.engine.abort(sequence)
            replica.counts[True] -= 1
            del self._lines[sequence]
            self.cut += 1
        self._fill(now_s)
        self._at(now_s + LOOK_S, self._look)

    def _fill(self, now_s: float) -> None:
        setting = self.setting
        while len(self._lines) < self._verdict.lines:
            verdict = self._verdict
            wait_s = self._pace.wait_s(
                verdict.prompt_tokens_per_s, verdict.prompt_tokens_at_once, now_s
            )
            if wait_s > 0.0:
                self._at(now_s + wait_s + 1e-6, self._fill)
                return
            sequence = self._made(self._line_draw, setting.line_prompt, setting.line_answer)
            sequence.rank = 1 if setting.priority else 0
            self._pace.begin(sequence.prompt_tokens)
            self._lines[sequence] = None
            self._submit(sequence, now_s)


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Setting(), command.add_argument
    add(
        "--rates", type=_numbers, default=(2.0, 8.0, 16.0), help="online requests a second (2,8,16)"
    )
    add("--replicas", type=int, default=base.replicas, help="default %(default)s")
    add("--seconds", type=float, default=base.seconds, help="measured (default %(default)s)")
    add("--profile", default=base.profile, help="of the engines (default %(default)s)")
    add("--priority", action="store_true", help="the engines compute online requests first")
    add("--burst", type=float, default=base.burst, help="times the rate, for a while (%(default)s)")
    add("--seed", type=int, default=base.seed, help="of arrivals and lengths")


def run(args: argparse.Namespace) -> int:
    """Run every rate with and without lines."""
    fields = {name: getattr(args, name) for name in vars(args) if name in Setting.__struct_fields__}
    print(
        "rate      lines   requests  TTFT p50     p99  gap p50    p99  line tokens/s  lines   cut"
    )
    for rate in args.rates:
        found = [Lab(Setting(rate=rate, **fields), lines=lines).run() for lines in (False, True)]
        for lines, each in zip(("without", "with"), found, strict=True):
            print(f"{rate:4g}/s  {lines:>8s}  {row(each)}")
        print(f"{'':6s}  {'rise':>8s}  {rises(*found)}")
    return 0


def row(found: Finding) -> str:
    """Return one run as text, in milliseconds."""
    times = (found.ttft_p50_s, found.ttft_p99_s, found.gap_p50_s, found.gap_p99_s)
    p50, p99, gap_p50, gap_p99 = (1e3 * value for value in times)
    return (
        f"{found.requests:8d}  {p50:8.1f} {p99:7.1f}  {gap_p50:7.2f} {gap_p99:6.2f}  "
        f"{found.line_tokens_per_s:13.0f}  {found.lines:5d}  {found.cut:4d}"
    )


def rises(without: Finding, with_lines: Finding) -> str:
    """Return by how much each time rose."""
    names = ("ttft_p50_s", "ttft_p99_s", "gap_p50_s", "gap_p99_s")
    shares = [getattr(with_lines, n) / (getattr(without, n) or math.inf) - 1 for n in names]
    p50, p99, gap_p50, gap_p99 = (f"{100 * share:+.1f}%" for share in shares)
    return f"{'':8s}  {p50:>8s} {p99:>7s}  {gap_p50:>7s} {gap_p99:>6s}"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",") if word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from error
