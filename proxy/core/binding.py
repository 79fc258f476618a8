"""Which chain hashes an engine still has cached, from its KV events and without a tokenizer.

Events name blocks by hashes of token ids; requests are known by hashes of octets. *Observation*
puts the two together. Of a request that was answered we know when it was sent, when its prefill had
ended and, from `usage`, how many tokens its prompt had and how many of them were cached: so in that
time the engine's tree grew a path to just this depth, from just that depth. When exactly one path
did, it is this prompt's, and the point `end` octets into the prompt lies in that path's block at
the same share of its depth. Where none did, because everything was cached, or several did, what
of the chain is not bound hangs on the deepest point of it that is: it needs that block in any case.

Whatever is not sure stays unbound, and the proxy's own record of what it sent goes on there: a
chain told as evicted that is not would cost a prefill. What can be mistaken are prompts of the same
length of which one goes on in a third that is computed at the same moment; turns do not, since
each waits for the answer before it.

A chain hash that was bound before and is met on another path keeps what the two paths share, since
that is what its octets can be at most. Where they share too little for an estimate that was off
(a template with the date in it), the newer path is right.

`KvBinding` is of one engine, or of one rank of it. Times are of one clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Final, NamedTuple

from proxy.core import limits
from proxy.core.kv_points import Point, Points
from proxy.core.kv_tree import GPU, Growth, KvTree, Run, medium_bit
from proxy.core.kv_wire import Event, Removed, Stored
from proxy.core.prefix import PrefixChain
from proxy.core.usage import Usage

# An estimate of where in the prompt a point lies is off by less than a quarter: that is how much
# the octets of a token differ between the parts of a prompt, as a rule.
_SURE_QUARTERS: Final = 3
_FULL_ATTENTION: Final = ("", "full_attention", "mla_attention")


class _Open:
    """A request under way."""

    __slots__ = ("chain", "dispatched_s", "prefilled_s")

    def __init__(self, chain: PrefixChain, dispatched_s: float) -> None:
        self.chain = chain
        self.dispatched_s = dispatched_s
        self.prefilled_s = 0.0


class _Ended(NamedTuple):
    due_s: float  # when all its events have come
    released_s: float
    chain: PrefixChain
    dispatched_s: float
    prefilled_s: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Told(NamedTuple):
    """What events mean for the index."""

    evicted: list[int]  # chain hashes, those from before `cleared` left out
    cleared: bool


class KvBinding:
    """The blocks of one engine and the chain hashes bound to them."""

    def __init__(self, now_s: float) -> None:
        self.tree = KvTree(now_s)
        self.points = Points(limits.KV_POINTS_MAX)
        self.block_tokens = 0  # not known yet
        self.bound = 0  # requests whose path was found,
        self.inherited = 0  # of which a shorter beginning was known,
        self.ambiguous = 0  # that could be on several,
        self.unseen = 0  # and those whose path did not show
        self._group: int | None = None
        self._group_known = False
        self._says_cached = False
        self._open: dict[Hashable, _Open] = {}
        self._ended: deque[_Ended] = deque(maxlen=limits.KV_OPEN_MAX)

    @property
    def resident_tokens(self) -> int:
        """Tokens on the card."""
        return self.tree.gpu_blocks * self.block_tokens

    def limit(self, blocks_max: int, points_max: int) -> None:
        """Say how much may be known of this engine, from now on."""
        self.tree.blocks_max = blocks_max
        self.points.chains_max = points_max

    # --- what the engine tells -----------------------------------------------------------------

    def apply(self, events: Iterable[Event], now_s: float) -> Told:
        """Take what one batch tells. What went and came back within it never went."""
        gone: list[int] = []
        cleared = False
        for event in events:
            if isinstance(event, Stored):
                self._store(event, now_s)
            elif isinstance(event, Removed):
                if event.group == self._group or event.group is None or not self._group_known:
                    gone += self.tree.remove(event.hashes, medium_bit(event.medium))
            elif self.clear(now_s):
                gone.clear()
                cleared = True
        evicted: list[int] = []
        for block in gone:
            if block not in self.tree.where:
                evicted += self.points.gone(block)
        return Told(evicted, cleared)

    def _store(self, event: Stored, now_s: float) -> None:
        # A hybrid model has several groups of layers; what a prompt can be continued from is what
        # the layers with full attention hold. Removals name the group and not its kind.
        if event.kind not in _FULL_ATTENTION or not event.hashes:
            return
        if not self._group_known:
            self._group, self._group_known = event.group, True
        elif event.group != self._group:
            return
        medium = medium_bit(event.medium)
        if event.block_tokens > 0 and medium == GPU:  # the host's may be larger
            self.block_tokens = event.block_tokens
        self.tree.store(event.hashes, event.parent, medium, now_s)

    def clear(self, now_s: float) -> bool:
        """The cache is empty. Say whether that is news."""
        news = bool(len(self.tree) or len(self.points))
        self.drop(now_s)
        return news

    def drop(self, now_s: float) -> None:
        """Nothing is known of the cache any more."""
        self.tree.clear(now_s)
        self.points = Points(self.points.chains_max)
        self._group, self._group_known = None, False

    def blind(self, now_s: float) -> None:
        """When things came until now was not when they happened: nothing is read from it."""
        self.tree.growths.clear()
        self.tree.known_since_s = now_s

    # --- what passed through the proxy ---------------------------------------------------------

    def dispatched(self, key: Hashable, chain: PrefixChain, now_s: float) -> None:
        if len(self._open) >= limits.KV_OPEN_MAX:
            del self._open[next(iter(self._open))]
        self._open[key] = _Open(chain, now_s)

    def prefill_ended(self, key: Hashable, now_s: float) -> None:
        request = self._open.get(key)
        if request is not None and not request.prefilled_s:
            request.prefilled_s = now_s

    def released(self, key: Hashable, usage: Usage | None, now_s: float) -> None:
        request = self._open.pop(key, None)
        if request is None or usage is None or not request.chain.hashes:
            return
        cached_tokens = usage.cached_tokens
        if cached_tokens is None:
            # Engines that say it leave it out when it is nothing; others never say it, and with
            # those no path can be told from another.
            if not self._says_cached:
                return
            cached_tokens = 0
        self._says_cached = True
        prefilled_s = request.prefilled_s or now_s
        self._ended.append(
            _Ended(
                now_s + limits.KV_LATE_S,
                now_s,
                request.chain,
                request.dispatched_s,
                prefilled_s,
                usage.prompt_tokens,
                cached_tokens,
                usage.completion_tokens,
            )
        )

    def advance(self, now_s: float) -> list[int]:
        """Bind the requests whose events must have come. Return chain hashes found to be gone."""
        ended = self._ended
        gone: list[int] = []
        while ended and ended[0].due_s <= now_s:
            gone += self._settle(ended.popleft())
        return gone

    def _settle(self, request: _Ended) -> list[int]:
        if self.block_tokens == 0:
            return []
        depth = request.prompt_tokens // self.block_tokens
        cached_blocks = request.cached_tokens // self.block_tokens
        if depth == 0:
            return []
        since_s = request.dispatched_s - limits.KV_EARLY_S
        if since_s < self.tree.known_since_s:  # what it grew may be forgotten
            self.unseen += 1
            return []
        found: list[Growth] = []
        # An engine computes at least the last token, and may have its block already. So where as
        # much was cached as can be, it need not have grown anything.
        if cached_blocks < (request.prompt_tokens - 1) // self.block_tokens:
            found = self._candidates(request, depth, cached_blocks, since_s)
        if len(found) > 1:
            found = [growth for growth in found if self._went_on(growth, request)] or found
        if len(found) > 1 and request.released_s - request.prefilled_s > limits.KV_LATE_S:
            # A stream began with its first token, which came with the step that ended the prefill.
            near_s = request.prefilled_s - limits.KV_FIRST_TOKEN_S
            found = [growth for growth in found if growth.at_s >= near_s] or found
        if len(found) > 1:
            found = self._on_known_path(found, request.chain, depth)
        if len(found) == 1:
            self.bound += 1
            return self._bind(found[0], request.chain, request.prompt_tokens)
        self.ambiguous += len(found) > 1
        self._inherit(request.chain, request.prompt_tokens)
        return []

    # --- which path ----------------------------------------------------------------------------

    def _candidates(
        self, request: _Ended, depth: int, cached_blocks: int, since_s: float
    ) -> list[Growth]:
        """Return the paths that grew to this depth from that one, each once.

        A prefill ends a step, and a step a batch; unless the engine tells of several at once, and
        then what the answer added is told with it.
        """
        until_s = request.prefilled_s + limits.KV_LATE_S
        whole = request.prompt_tokens + request.completion_tokens
        ends = (depth, (whole - 1) // self.block_tokens, whole // self.block_tokens)
        found: dict[object, Growth] = {}
        unclear = False
        for growth in self.tree.grown(since_s, until_s, depth):
            if growth.last not in ends:
                continue
            fits = self._grew_from(growth, cached_blocks, since_s)
            unclear |= fits is None
            if fits is not False:
                found[self._name(growth, depth)] = growth
        if unclear and len(found) == 1:  # it may be the one, and may not
            self.ambiguous += 1
            return []
        return list(found.values())

    def _name(self, growth: Growth, depth: int) -> object:
        """Return the block at a depth: it names the path. Where it is gone, the growth does."""
        block = self._block(growth, depth)
        return growth if block is None else block

    def _grew_from(self, growth: Growth, cached_blocks: int, since_s: float) -> bool | None:
        """Say whether what a path grew began after just so many blocks; None: it cannot be seen.

        Blocks after those must be of this time, and of another step than those before, unless
        they branched off.
        """
        first = cached_blocks + 1
        if growth.first <= first:
            return growth.first == first
        if growth.before_s < since_s:
            return False
        place = self.tree.place(growth.run, first)
        if place is None:
            return None  # it has gone meanwhile
        run, index = place
        came_s = run.times[index]
        if came_s > growth.at_s:
            return None  # and another path lies there now
        if came_s < since_s:
            return False
        return cached_blocks == 0 or index == 0 or run.times[index - 1] != came_s

    def _block(self, growth: Growth, depth: int) -> int | None:
        """Return the block at a depth of the path that grew; None when it is gone."""
        place = self.tree.place(growth.run, depth)
        if place is None:
            return None
        run, index = place
        block = run.hashes[index]
        if run.times[index] > growth.at_s or self.tree.where.get(block) is not run:
            return None
        return block

    def _surely_gone(self, growth: Growth, depth: int) -> bool:
        """Say whether the block that a path had at a depth cannot have come back elsewhere."""
        run, where = growth.run, self.tree.where
        place = self.tree.place(run, depth)
        if place is not None:
            at, index = place
            return at.times[index] <= growth.at_s and at.hashes[index] not in where
        if depth <= run.start:
            return False
        if not run.hashes:  # all of it went; it would have come back with its first block
            return run.name not in where
        if run.times[-1] > growth.at_s:  # another path goes there
            return False
        return run.attached is None or run.end not in run.attached

    def _went_on(self, growth: Growth, request: _Ended) -> bool:
        """Say whether a path went on in time for as many blocks as the answer filled.

        It may have gone further: others may have built on it.
        """
        run = growth.run
        if run.floor >= growth.last or run.end < growth.last:
            return True  # several go on from here, or it has gone: nobody knows
        last = (request.prompt_tokens + request.completion_tokens - 1) // self.block_tokens
        if last > run.peak:
            return False
        place = self.tree.place(run, last)
        return place is None or place[0].times[place[1]] <= request.due_s

    def _on_known_path(self, found: list[Growth], chain: PrefixChain, depth: int) -> list[Growth]:
        """Keep of several paths those that go where the chain was before; all, if none does."""
        known = self._deepest(chain)
        if known is None:
            return found
        point = known[1]
        shared = max(1, min(point.depth, depth) * _SURE_QUARTERS // 4)
        run = self.tree.where[point.block]
        place = self.tree.place(run, shared)
        if place is None:
            return found
        block = place[0].hashes[place[1]]
        return [growth for growth in found if self._block(growth, shared) == block] or found

    def _deepest(self, chain: PrefixChain) -> tuple[int, Point] | None:
        """Return index and point of the longest beginning of a chain that is bound."""
        for index in range(len(chain.hashes) - 1, -1, -1):
            point = self.points.at_chain(chain.hashes[index])
            if point is not None:
                return index, point
        return None

    # --- bound to it ---------------------------------------------------------------------------

    def _depth(self, chain: PrefixChain, index: int, prompt_tokens: int) -> int:
        """Return how many full blocks the beginning of a prompt fills."""
        tokens = prompt_tokens * chain.ends[index] // max(1, chain.prompt_bytes)
        return min(tokens, prompt_tokens) // self.block_tokens

    def _bind(self, growth: Growth, chain: PrefixChain, prompt_tokens: int) -> list[int]:
        """Bind a chain along the path that its request grew. Return what of it is gone."""
        gone: list[int] = []
        below: Point | None = None
        for index in range(len(chain.hashes) - 1, -1, -1):
            name = chain.hashes[index]
            depth = self._depth(chain, index, prompt_tokens)
            if depth == 0:
                break
            known = self.points.at_chain(name)
            if known is not None:
                depth = self._shared_depth(growth, known, depth)
            block = self._block(growth, depth)
            if block is None:
                if known is None and self._surely_gone(growth, depth):
                    gone.append(name)
                continue
            point = self.points.bind(name, block, depth)
            if below is not None:
                self._join(point, below)
            below = point
        return gone

    def _join(self, above: Point, below: Point) -> None:
        """One lies above the other on a path; there may be others between."""
        while below.above is not None and below.above.depth > above.depth:
            below = below.above
        beyond = below.above
        if above.depth < below.depth and beyond is not above:
            self.points.join(above, below)
            if beyond is not None and above.above is None:
                self.points.join(beyond, above)

    def _shared_depth(self, growth: Growth, known: Point, depth: int) -> int:
        """Return how deep a chain hash lies that was bound before: no deeper than both paths go."""
        if self._block(growth, known.depth) == known.block:
            # What hung on a shorter beginning has its own place now.
            return known.depth if known.depth * 4 >= depth * _SURE_QUARTERS else depth
        run: Run | None = self.tree.where[known.block]
        low, high = 0, min(known.depth, depth)
        assert run is not None
        while low < high:  # paths that part never meet again
            middle = (low + high + 1) // 2
            place = self.tree.place(run, middle)
            block = None if place is None else place[0].hashes[place[1]]
            if block is not None and self._block(growth, middle) == block:
                low = middle
            else:
                high = middle - 1
        return low if low * 4 >= depth * _SURE_QUARTERS else depth

    def _inherit(self, chain: PrefixChain, prompt_tokens: int) -> None:
        """Hang what is not bound of a chain on the deepest point of it that is."""
        deepest = self._deepest(chain)
        if deepest is None:
            self.unseen += 1
            return
        self.inherited += 1
        known, point = deepest
        run = self.tree.where[point.block]
        below = point
        for index in range(len(chain.hashes) - 1, -1, -1):
            name = chain.hashes[index]
            if index >= known:
                self.points.bind(name, point.block, point.depth)
            elif self.points.at_chain(name) is None:
                depth = min(self._depth(chain, index, prompt_tokens), point.depth)
                place = self.tree.place(run, depth) if depth else None
                if place is None:
                    break
                block = place[0].hashes[place[1]]
                if self.tree.where.get(block) is place[0]:
                    above = self.points.bind(name, block, depth)
                    self._join(above, below)
                    below = above
