"""The blocks of one engine's KV cache, as its events tell of them: which are resident, and on what.

A path of blocks is kept as runs: blocks that follow one upon another without a branch, so that what
a prefill or an answer adds costs a bulk insertion and no object for each block. `where` says in
which run a resident block is; depths count from 1 at the root. A block that went while others
still build on it leaves its place in the run, so that it can come back there: an engine may evict
in any order, though it nearly always begins at the leaves.

Media are part of the state: what left the card and stayed in host memory is still resident. Blocks
whose parent nobody told us of have no depth, and count as resident all the same.

Memory: about 110 octets a block in long runs (the dictionary 42, the number 48, its place 8, when
it came 8), some 500 where each block is a run of its own: `python -m tests.bench_core.kv` measures
it. Blocks are bounded, kept places included; what is new beyond that is not taken in.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import Final, NamedTuple

from proxy.core import limits

GPU: Final = 1
HOST: Final = 2
BEYOND: Final = 4  # disks, other machines
_MEDIA: Final = {"": GPU, "GPU": GPU, "CPU": HOST, "CPU_PINNED": HOST}
_NO_DEPTH: Final = -(1 << 40)


def medium_bit(medium: str) -> int:
    return _MEDIA.get(medium, BEYOND)


class Run:
    """Blocks in a row: `hashes[i]` is at depth `start + 1 + i` and came at `times[i]`."""

    __slots__ = ("above", "attached", "below", "floor", "hashes", "name", "peak", "start", "times")

    def __init__(self, name: int, above: Run | None, start: int) -> None:
        self.name = name  # its first block
        self.above = above
        self.start = start
        self.hashes: list[int] = []
        self.times = array("d")
        # What branches off: by first hash; and how many at each depth, `floor` the deepest.
        self.below: dict[int, Run] | None = None
        self.attached: dict[int, int] | None = None
        self.floor = start
        self.peak = start  # the deepest that its end ever was

    @property
    def end(self) -> int:
        return self.start + len(self.hashes)


class Growth(NamedTuple):
    """In one batch, this run grew from depth `first` to depth `last`."""

    at_s: float
    run: Run
    first: int
    last: int
    before_s: float  # when the block before the first one had come; 0: there is none


class KvTree:
    """The resident blocks of one engine, or of one rank of it."""

    __slots__ = (
        "_first_hashes", "_held", "_media", "_off_gpu", "blocks_max", "growths", "known_since_s",
        "refused_blocks", "where",
    )  # fmt: skip

    def __init__(self, now_s: float, blocks_max: int = limits.KV_BLOCKS_MAX) -> None:
        self.blocks_max = blocks_max
        self.refused_blocks = 0
        self.where: dict[int, Run] = {}
        self._held = 0  # places in runs
        self._first_hashes: dict[int, Run] = {}  # runs that begin at the root
        self._media: dict[int, int] = {}  # of blocks that are not on the card alone
        self._off_gpu = 0
        self.growths: list[Growth] = []  # in order of time
        self.known_since_s = now_s  # no growth after this is missing from the list

    def __len__(self) -> int:
        return len(self.where)

    @property
    def gpu_blocks(self) -> int:
        return len(self.where) - self._off_gpu

    def clear(self, now_s: float) -> None:
        self.where = {}
        self._held = 0
        self._first_hashes = {}
        self._media = {}
        self._off_gpu = 0
        self.growths = []
        self.known_since_s = now_s

    # --- what comes ------------------------------------------------------------------------

    def store(self, hashes: list[int], parent: int | None, medium: int, now_s: float) -> None:
        """Blocks came, one upon the other; some or all of them may be here already."""
        where = self.where
        count = len(hashes)
        at = 0
        while at < count and hashes[at] in where:
            at += 1
        if self._held + count - at > self.blocks_max:
            self.refused_blocks += count - at
            return
        if medium != GPU or self._media:
            self._add_medium(hashes, medium)
        if at == count:
            return
        if at:
            parent = hashes[at - 1]
        if parent is None and medium != GPU:
            # Connectors that copy blocks to the host name no parents: nobody knows how deep.
            run, depth = Run(hashes[at], None, _NO_DEPTH), _NO_DEPTH
        else:
            run, depth = self._locate(parent, hashes[at])
        self._lay(run, depth, hashes, at, now_s)

    def _add_medium(self, hashes: list[int], medium: int) -> None:
        """Blocks, resident or about to be, are now in this medium, too."""
        for block in dict.fromkeys(hashes):
            if block in self.where:
                before = self._media.get(block, GPU)
                self._set_media(block, before, before | medium)
            elif medium != GPU:
                self._media[block] = medium
                self._off_gpu += 1

    def _set_media(self, block: int, before: int, after: int) -> None:
        if after == GPU:
            self._media.pop(block, None)
        else:
            self._media[block] = after
        self._off_gpu += (before & GPU) - (after & GPU)

    def _locate(self, parent: int | None, first: int) -> tuple[Run, int]:
        """Return the run to go on with and the depth to go on after."""
        if parent is None:
            run = self._first_hashes.get(first)
            if run is None:
                run = self._first_hashes[first] = Run(first, None, 0)
            return run, 0
        above = self.where.get(parent)
        if above is None:
            return Run(first, None, _NO_DEPTH), _NO_DEPTH
        return above, self.depth_in(above, parent)

    def _lay(self, run: Run, depth: int, hashes: list[int], at: int, now_s: float) -> None:
        """Lay `hashes[at:]` after `depth` of a run: in places kept for them, then in new ones."""
        count = len(hashes)
        while at < count:
            place = depth - run.start
            first = depth
            while place < len(run.hashes) and at < count and run.hashes[place] == hashes[at]:
                if self.where.get(hashes[at]) is not run:
                    self.where[hashes[at]] = run
                    run.times[place] = now_s
                place += 1
                at += 1
                depth += 1
            if depth > first:
                self._grew(run, first + 1, depth, now_s)
            if at == count:
                return
            below = run.below.get(hashes[at]) if run.below is not None else None
            if below is not None and below.start == depth:
                run = below
                continue
            if place < len(run.hashes):  # another path goes on here
                run = self._branch(run, depth, hashes[at])
            rest = hashes[at:]
            run.hashes.extend(rest)
            run.times.extend(array("d", (now_s,)) * len(rest))
            run.peak = max(run.peak, run.end)
            self._held += len(rest)
            self.where.update(dict.fromkeys(rest, run))
            self._grew(run, depth + 1, depth + len(rest), now_s)
            return

    @staticmethod
    def _branch(above: Run, depth: int, first: int) -> Run:
        run = Run(first, above, depth)
        if above.below is None or above.attached is None:
            above.below, above.attached = {}, {}
        above.below[first] = run
        above.attached[depth] = above.attached.get(depth, 0) + 1
        above.floor = max(above.floor, depth)
        return run

    def _grew(self, run: Run, first: int, last: int, now_s: float) -> None:
        if last <= 0:
            return
        growths = self.growths
        if growths:
            before = growths[-1]
            if before.run is run and before.last + 1 == first and before.at_s == now_s:
                growths[-1] = Growth(now_s, run, before.first, last, before.before_s)
                return
        place = self.place(run, first - 1) if first > 1 else None
        before_s = place[0].times[place[1]] if place is not None else 0.0
        growths.append(Growth(now_s, run, first, last, before_s))
        if len(growths) > 2 * limits.KV_GROWTHS_MAX:
            self.known_since_s = growths[limits.KV_GROWTHS_MAX - 1].at_s
            del growths[: limits.KV_GROWTHS_MAX]

    # --- what goes -------------------------------------------------------------------------

    def remove(self, hashes: list[int], medium: int) -> list[int]:
        """Blocks left a medium. Return those that are in none any more."""
        where, media = self.where, self._media
        gone: list[int] = []
        for block in hashes:
            run = where.get(block)
            if run is None:
                continue
            if media or medium != GPU:
                before = media.get(block, GPU)
                after = before & ~medium
                if after:
                    self._set_media(block, before, after)
                    continue
                if media.pop(block, GPU) & GPU == 0:
                    self._off_gpu -= 1
            del where[block]
            gone.append(block)
            if run.hashes[-1] == block:
                self._trim(run)
        return gone

    def _trim(self, run: Run) -> None:
        """Give up places at the end of a run that are empty and that nothing builds on."""
        where = self.where
        while True:
            hashes, kept = run.hashes, run.floor - run.start
            while len(hashes) > kept and where.get(hashes[-1]) is not run:
                hashes.pop()
                run.times.pop()
                self._held -= 1
            if hashes:
                return
            above = run.above
            if above is None:
                if self._first_hashes.get(run.name) is run:
                    del self._first_hashes[run.name]
                return
            self._detach(above, run)
            if where.get(above.hashes[-1]) is above:
                return
            run = above

    @staticmethod
    def _detach(above: Run, run: Run) -> None:
        if above.below is None or above.attached is None:
            return
        if above.below.get(run.name) is run:
            del above.below[run.name]
        left = above.attached[run.start] - 1
        if left:
            above.attached[run.start] = left
            return
        del above.attached[run.start]
        if run.start == above.floor:
            above.floor = max(above.attached, default=above.start)

    # --- questions -------------------------------------------------------------------------

    def media_of(self, block: int) -> int:
        """Return where a resident block is, as a sum of media."""
        return self._media.get(block, GPU)

    @staticmethod
    def depth_in(run: Run, block: int) -> int:
        """Return the depth of a block of a run. Mostly it is the last one."""
        if run.hashes[-1] == block:
            return run.start + len(run.hashes)
        return run.start + 1 + run.hashes.index(block)

    @staticmethod
    def place(run: Run, depth: int) -> tuple[Run, int] | None:
        """Return where on the path that this run ends the block of a depth is; None: beyond it."""
        while depth <= run.start:
            if run.above is None:
                return None
            run = run.above
        index = depth - run.start - 1
        return (run, index) if index < len(run.hashes) else None

    def grown(self, since_s: float, until_s: float, depth: int) -> list[Growth]:
        """Return what grew through a depth between two moments."""
        growths = self.growths
        begin = bisect_left(growths, since_s, key=_when)
        found: list[Growth] = []
        for index in range(begin, len(growths)):
            growth = growths[index]
            if growth.at_s > until_s:
                break
            if growth.first <= depth <= growth.last:
                found.append(growth)
        return found


def _when(growth: Growth) -> float:
    return growth.at_s
