"""What is told as evicted is gone, and of what is gone most is told."""

from __future__ import annotations

import random
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.binding import KvBinding
from proxy.core.kv_wire import CLEARED, Event, Removed, Stored
from proxy.core.prefix import PrefixChain
from proxy.core.usage import Usage
from tests.fakes.cached_engine import BLOCK_TOKENS, Asked, CachedEngine, chain_of

BLOCK = 16  # octets
LATER_S = 2 * limits.KV_LATE_S


class Bench:
    """An engine and what follows it; checks every word that it is told."""

    def __init__(self, blocks_max: int, ends: Iterable[int]) -> None:
        self.engine = CachedEngine(blocks_max)
        self.ends = tuple(ends)
        self.now_s = 100.0
        self.binding = KvBinding(self.now_s - 1.0)
        self.needs: dict[int, list[int]] = {}  # chain hash -> the blocks that it needs
        self.believed: set[int] = set()
        self.resident: set[int] = set()  # as told by the events that were applied
        self.waiting: list[tuple[float, list[Event]]] = []
        self.keys = 0
        self.gone = self.told = 0

    def begin(self, prompt: bytes, answer: bytes = b"") -> tuple[int, Asked] | None:
        asked = Asked(prompt, answer)
        if not self.engine.begin(asked):
            return None
        chain = chain_of(prompt, self.ends)
        for name, end in zip(chain.hashes, chain.ends, strict=True):
            self.needs[name] = asked.blocks[: end // BLOCK]
        self.believed.update(chain.hashes)
        self.keys += 1
        self.binding.dispatched(self.keys, chain, self.now_s)
        return self.keys, asked

    def step(self, delay_s: float = 0.0) -> None:
        """What the engine did until now is told so much later; time goes on."""
        events = self.engine.told()
        if events:
            at_s = max(self.now_s + delay_s, self.waiting[-1][0] + 1e-6 if self.waiting else 0.0)
            self.waiting.append((at_s, events))
        self.pass_time(0.01)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        while self.waiting and self.waiting[0][0] <= self.now_s:
            at_s, events = self.waiting.pop(0)
            for event in events:
                self._track(event)
            told = self.binding.apply(events, at_s)
            if told.cleared:
                self.believed.clear()
            self._check(told.evicted)
        self._check(self.binding.advance(self.now_s))

    def _track(self, event: Event) -> None:
        if isinstance(event, Stored):
            self.resident.update(event.hashes)
        elif isinstance(event, Removed):
            self.resident.difference_update(event.hashes)
        else:
            self.resident.clear()

    def _check(self, evicted: list[int]) -> None:
        for name in evicted:
            assert not all(block in self.resident for block in self.needs[name])
        self.believed.difference_update(evicted)

    def stale(self) -> tuple[int, int]:
        """Return how many of all chain hashes are gone, and how many of those are believed."""
        gone = {
            name
            for name, needs in self.needs.items()
            if needs and not all(block in self.resident for block in needs)
        }
        return len(gone), len(gone & self.believed)

    def run(self, prompt: bytes, answer: bytes = b"") -> None:
        """One request from beginning to end, alone."""
        begun = self.begin(prompt, answer)
        assert begun is not None
        key, asked = begun
        self.engine.prefill(asked)
        self.step()
        self.binding.prefill_ended(key, self.now_s)
        while self.engine.decode(asked):
            self.step()
        self.end(key, asked)
        self.pass_time(LATER_S)

    def end(self, key: int, asked: Asked, usage: Usage | None = None) -> None:
        self.engine.end(asked)
        self.step()
        self.binding.released(key, usage or asked.usage, self.now_s)


def text(seed: int, blocks: int) -> bytes:
    return random.Random(seed).randbytes(blocks * BLOCK)


def test_a_prompt_is_bound_and_told_when_it_goes() -> None:
    bench = Bench(20, ends=(64, 128))
    first, second = text(1, 12), text(2, 18)
    bench.run(first)
    assert bench.binding.bound == 1
    assert bench.binding.resident_tokens == 12 * BLOCK_TOKENS
    points = [bench.binding.points.at_chain(name) for name in chain_of(first, (64, 128)).hashes]
    assert [point and point.depth for point in points] == [4, 8, 12]
    bench.run(second)
    assert bench.stale() == (3, 0)  # gone, and nobody believes in it


def test_a_shared_head_stays_while_its_tails_go() -> None:
    bench = Bench(16, ends=(64,))
    head = text(1, 4)
    for seed in range(2, 9):
        bench.run(head + text(seed, 6))
    assert bench.binding.bound == 7
    assert chain_of(head, ()).hashes[0] in bench.believed
    assert bench.stale() == (5, 0)  # the last two tails are there


def test_a_turn_goes_on_where_the_last_one_ended() -> None:
    bench = Bench(40, ends=(64, 128, 192, 256))
    prompt, answer = text(1, 6), text(2, 3)
    bench.run(prompt, answer)
    bench.run(prompt + answer + text(3, 5))
    assert bench.binding.bound == 2
    bench.run(text(4, 40))
    gone, believed = bench.stale()
    assert (gone, believed) == (len(bench.needs) - 5, 0)


def test_what_was_wholly_cached_hangs_on_what_is_known() -> None:
    bench = Bench(20, ends=(64, 128))
    prompt = text(1, 12)
    bench.run(prompt)
    bench.run(prompt[: 10 * BLOCK + 5])
    assert bench.binding.inherited == 1
    bench.run(text(2, 20))
    assert bench.stale()[1] == 0


def test_points_before_the_known_one_get_their_own_blocks() -> None:
    bench = Bench(20, ends=())
    prompt = text(1, 12)
    bench.run(prompt)
    bench.ends = (64, 128)
    bench.run(prompt)
    points = [bench.binding.points.at_chain(name) for name in chain_of(prompt, (64, 128)).hashes]
    assert [point and point.depth for point in points] == [4, 8, 12]
    assert bench.binding.inherited == 1
    bench.run(text(2, 11))  # takes the last blocks of it
    assert bench.stale() == (1, 0)
    assert points[0] is bench.binding.points.at_block(
        bench.needs[chain_of(prompt, (64,)).hashes[0]][-1]
    )


def test_two_that_look_alike_are_not_bound() -> None:
    bench = Bench(40, ends=(64, 128))
    begun = [bench.begin(text(seed, 8)) for seed in (1, 2)]
    for pair in begun:
        assert pair is not None
        bench.engine.prefill(pair[1])
        bench.step()
        bench.binding.prefill_ended(pair[0], bench.now_s)
    for pair in begun:
        assert pair is not None
        bench.end(*pair)
    bench.pass_time(LATER_S)
    assert (bench.binding.bound, bench.binding.ambiguous) == (0, 2)
    # Their next turns are not alike, and bind what they share with these.
    bench.run(text(1, 8) + text(3, 2))
    bench.run(text(2, 8) + text(4, 3))
    assert bench.binding.bound == 2
    assert bench.binding.points.at_chain(chain_of(text(1, 8), ()).hashes[0])


def test_of_two_that_look_alike_the_known_path_tells() -> None:
    bench = Bench(80, ends=(64, 128))
    heads = [text(1, 8), text(2, 8)]
    for head in heads:
        bench.run(head)
    begun = [bench.begin(head + text(7, 4)) for head in heads]
    for pair in begun:
        assert pair is not None
        bench.engine.prefill(pair[1])
        bench.step()
    for pair in begun:
        assert pair is not None
        bench.end(*pair)
    bench.pass_time(LATER_S)
    assert (bench.binding.bound, bench.binding.ambiguous) == (4, 0)


def test_a_clear_is_news_once() -> None:
    bench = Bench(20, ends=(64,))
    bench.run(text(1, 6))
    assert bench.binding.clear(bench.now_s)
    assert not bench.binding.apply([CLEARED], bench.now_s).cleared
    assert len(bench.binding.points) == bench.binding.resident_tokens == 0


def test_an_answer_without_counts_binds_nothing() -> None:
    bench = Bench(20, ends=(64,))
    begun = bench.begin(text(1, 6))
    assert begun is not None
    bench.engine.prefill(begun[1])
    bench.step()
    bench.binding.released(begun[0], None, bench.now_s)
    bench.pass_time(LATER_S)
    assert len(bench.binding.points) == 0


def test_cached_tokens_that_are_not_said_are_none_where_others_are_said() -> None:
    bench = Bench(80, ends=(64,))
    for seed, said, bound in ((1, None, 0), (2, 0, 1), (3, None, 2)):
        begun = bench.begin(text(seed, 6))
        assert begun is not None
        bench.engine.prefill(begun[1])
        bench.step()
        bench.end(*begun, usage=Usage(6 * BLOCK_TOKENS, 0, said))
        bench.pass_time(LATER_S)
        assert bench.binding.bound == bound


def test_what_grew_at_an_unknown_time_binds_nothing() -> None:
    bench = Bench(20, ends=(64,))
    begun = bench.begin(text(1, 6))
    assert begun is not None
    bench.engine.prefill(begun[1])
    bench.step()
    bench.binding.blind(bench.now_s)
    bench.end(*begun)
    bench.pass_time(LATER_S)
    assert (bench.binding.bound, bench.binding.unseen) == (0, 1)


def test_other_groups_of_layers_are_not_followed() -> None:
    binding = KvBinding(0.0)
    window = Stored([1, 2], None, 32, 1, "sliding_window", "GPU", "")
    binding.apply([window, Stored([5, 6], None, 16, 0, "full_attention", "GPU", "")], 1.0)
    binding.apply([Removed([5], 1, "GPU"), Stored([7], 6, 16, 2, "full_attention", "GPU", "")], 2.0)
    assert binding.resident_tokens == 2 * 16
    binding.apply([Removed([6], 0, "GPU"), Removed([5], None, "")], 3.0)
    assert binding.resident_tokens == 0


def test_blocks_of_the_host_are_of_their_own_size() -> None:
    binding = KvBinding(0.0)
    binding.apply([Stored([5, 6], None, 16, 0, "", "GPU", "")], 1.0)
    binding.apply([Stored([6], None, 64, 0, "", "CPU", "")], 2.0)
    assert binding.resident_tokens == 2 * 16


def test_requests_under_way_are_bounded() -> None:
    binding = KvBinding(0.0)
    chain = chain_of(b"x" * 64, ())
    for key in range(limits.KV_OPEN_MAX + 5):
        binding.dispatched(key, chain, 1.0)
    assert len(binding._open) == limits.KV_OPEN_MAX


def test_a_chain_on_a_new_path_is_told_by_the_new_one() -> None:
    """The engine's prompt has a date in it that the request has not."""
    binding = KvBinding(0.0)
    chain = PrefixChain(0, [77], [160], 160)
    for day, blocks in ((1.0, [1, 2, 3, 4]), (2.0, [1, 12, 13, 14])):
        binding.dispatched(day, chain, day)
        begin = 0 if day == 1.0 else 1
        stored = Stored(blocks[begin:], blocks[0] if begin else None, 4, 0, "", "GPU", "")
        binding.apply([stored], day + 0.1)
        binding.released(day, Usage(16, 0, 4 * begin), day + 0.2)
        assert binding.advance(day + 0.9) == []
    assert binding.apply([Removed([4], 0, "GPU")], 3.0).evicted == []
    assert binding.apply([Removed([14], 0, "GPU")], 3.0).evicted == [77]


def test_a_chain_on_two_paths_keeps_what_they_share() -> None:
    """Where the tokens of a prompt are not spread evenly, an estimate lands beyond the fork."""
    binding = KvBinding(0.0)
    for day, blocks, chain in (
        (1.0, [1, 2, 3, 4, 5], PrefixChain(0, [70, 71], [80, 100], 100)),
        (2.0, [1, 2, 3, 14, 15], PrefixChain(0, [70, 72], [80, 100], 100)),
    ):
        binding.dispatched(day, chain, day)
        begin = 0 if day == 1.0 else 3
        stored = Stored(blocks[begin:], blocks[begin - 1] if begin else None, 4, 0, "", "GPU", "")
        binding.apply([stored], day + 0.1)
        binding.released(day, Usage(20, 0, 4 * begin), day + 0.2)
        assert binding.advance(day + 0.9) == []
    assert binding.apply([Removed([5, 4, 15, 14], 0, "GPU")], 3.0).evicted == [71, 72]
    assert binding.apply([Removed([3], 0, "GPU")], 3.0).evicted == [70]


OPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "begin", "prefill", "prefill", "decode", "end", "end", "wait"]),
        st.integers(0, 3), st.integers(0, 3), st.integers(1, 5), st.integers(0, 40),
    ),
    max_size=80,
)  # fmt: skip


@given(st.integers(6, 40), OPS)
def test_what_is_told_as_evicted_is_gone(
    blocks_max: int, ops: list[tuple[str, int, int, int, int]]
) -> None:
    drive(Bench(blocks_max, ends=(24, 64, 100, 160, 200)), ops)


def drive(bench: Bench, ops: Iterable[tuple[str, int, int, int, int]]) -> None:
    """Let requests with shared heads come, and their steps happen, in any order."""
    begun: list[tuple[int, Asked]] = []
    waiting: list[tuple[int, Asked]] = []
    for what, head, tail, blocks, delay in ops:
        if what == "begin":
            # Heads of a few lengths, tails of a few more: many prompts that look alike, or are the
            # same. None goes on from another, as turns do: those come when that one has ended.
            seed = 100 * head + 10 * tail + blocks
            prompt = text(head, 3 + head) + text(seed, blocks)[: 70 - 4 * (tail % 2)]
            pair = bench.begin(prompt[: len(prompt) // 4 * 4], text(50 + tail, tail))
            if pair is not None:
                waiting.append(pair)
        elif what == "prefill" and waiting:
            key, asked = waiting.pop(head % len(waiting))
            bench.engine.prefill(asked)
            bench.step(delay / 1000)
            bench.binding.prefill_ended(key, bench.now_s)
            begun.append((key, asked))
        elif what == "decode" and begun:
            bench.engine.decode(begun[head % len(begun)][1])
            bench.step(delay / 1000)
        elif what == "end" and begun:
            bench.end(*begun.pop(head % len(begun)))
        elif what == "wait":
            bench.pass_time(delay / 40)
    for key, asked in waiting:
        bench.engine.prefill(asked)
        begun.append((key, asked))
        bench.step()
    for pair in begun:
        bench.end(*pair)
    bench.pass_time(LATER_S)


def test_of_what_is_gone_most_is_told() -> None:
    draw = random.Random(7)
    bench = Bench(2000, ends=(64, 128, 256, 512, 1024, 2048, 4096))
    kinds = ["begin", "prefill", "decode", "decode", "end", "wait"]
    heads = [text(seed, 3 + seed) for seed in range(4)]
    begun: list[tuple[int, Asked]] = []
    waiting: list[tuple[int, Asked]] = []
    said: list[bytes] = []
    for number in range(4000):
        what = draw.choice(kinds)
        if what == "begin":
            old = draw.choice(said[-20:]) if said and draw.random() < 0.5 else draw.choice(heads)
            prompt = old + text(1000 + number, 100)[: 4 * draw.randint(1, 400)]
            pair = bench.begin(prompt, text(number, 2)) if len(prompt) < 8000 else None
            if pair is not None:
                waiting.append(pair)
        elif what == "prefill" and waiting:
            key, asked = waiting.pop(0)
            bench.engine.prefill(asked)
            bench.step(0.003)
            bench.binding.prefill_ended(key, bench.now_s)
            begun.append((key, asked))
        elif what == "decode" and begun:
            bench.engine.decode(draw.choice(begun)[1])
            bench.step(0.003)
        elif what == "end" and begun:
            key, asked = begun.pop(draw.randrange(len(begun)))
            said.append(asked.tokens)
            bench.end(key, asked)
        elif what == "wait":
            bench.pass_time(0.05)
    bench.pass_time(LATER_S)
    gone, believed = bench.stale()
    binding = bench.binding
    assert gone > 500
    assert believed <= 0.15 * gone
    assert binding.bound >= 0.8 * (binding.bound + binding.ambiguous + binding.unseen)
