"""Blocks that replicas hold: least recently used goes first, and one index over all of them.

Children are touched before their parents, so a chain is always forgotten from its end, as the
engines evict leaves first. `Caches` is what a router believes and what the serial engine has;
`SharedMemory` is one where running requests pin their blocks and answers take room besides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Caches:
    """A set of blocks for each replica, and for each block the replicas that hold it, as bits."""

    def __init__(self, replicas: int, capacity_blocks: int) -> None:
        self.replicas = replicas
        self.capacity_blocks = max(1, capacity_blocks)
        self.idle: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
        self._holders: dict[int, int] = {}

    def insert(self, replica: int, blocks: Sequence[int]) -> None:
        idle, bit = self.idle[replica], 1 << replica
        for block in reversed(blocks[: self.capacity_blocks]):
            if block in idle:
                idle.move_to_end(block)
            else:
                idle[block] = None
                self._hold(block, bit)
        self._evict(idle, bit, self.capacity_blocks)

    def _hold(self, block: int, bit: int) -> None:
        self._holders[block] = self._holders.get(block, 0) | bit

    def _evict(self, idle: OrderedDict[int, None], bit: int, left: int) -> None:
        """Forget the oldest until `left` blocks are idle at most."""
        holders = self._holders
        while len(idle) > left:
            block = idle.popitem(last=False)[0]
            rest = holders[block] & ~bit
            if rest:
                holders[block] = rest
            else:
                del holders[block]

    def clear(self, replica: int) -> None:
        self._evict(self.idle[replica], 1 << replica, 0)

    def depth(self, replica: int, blocks: Sequence[int]) -> int:
        """Return how many leading blocks one replica holds."""
        holders, bit = self._holders, 1 << replica
        for depth, block in enumerate(blocks):
            if not holders.get(block, 0) & bit:
                return depth
        return len(blocks)

    def depths(self, blocks: Sequence[int]) -> list[int]:
        """Return how many leading blocks each replica holds."""
        depths = [0] * self.replicas
        mask = (1 << self.replicas) - 1
        holders = self._holders
        depth = 0
        for block in blocks:
            held = holders.get(block, 0) & mask
            if held != mask:
                _settle(depths, mask & ~held, depth)
                mask = held
                if not mask:
                    return depths
            depth += 1
        _settle(depths, mask, depth)
        return depths


def _settle(depths: list[int], replicas: int, depth: int) -> None:
    while replicas:
        lowest = replicas & -replicas
        depths[lowest.bit_length() - 1] = depth
        replicas ^= lowest


class SharedMemory(Caches):
    """KV memory in which running requests and what is cached of others share the room."""

    def __init__(self, replicas: int, capacity_blocks: int) -> None:
        super().__init__(replicas, capacity_blocks)
        self._pins: list[dict[int, int]] = [{} for _ in range(replicas)]
        self._private = [0] * replicas  # blocks of answers

    def lacking(self, replica: int, blocks: Sequence[int], private: int) -> int:
        """Return how many blocks too many a request would need now; 0 or less: it fits."""
        pins = self._pins[replica]
        pinned = sum(1 for block in blocks if block in pins)
        # Idle blocks can be evicted, unless they are this request's own, which then need no more.
        wanted = len(blocks) - pinned + private
        return len(pins) + self._private[replica] + wanted - self.capacity_blocks

    def admit(self, replica: int, blocks: Sequence[int], private: int) -> bool:
        """Pin a request's blocks, if they fit, and reserve those of its answer."""
        if self.lacking(replica, blocks, private) > 0:
            return False
        pins, idle, bit = self._pins[replica], self.idle[replica], 1 << replica
        for block in blocks:
            if block in pins:
                pins[block] += 1
                continue
            pins[block] = 1
            if block in idle:
                del idle[block]
            else:
                self._hold(block, bit)
        self._private[replica] += private
        room = self.capacity_blocks - len(pins) - self._private[replica]
        self._evict(idle, bit, room)
        return True

    def leave(self, replica: int, blocks: Sequence[int], private: int) -> None:
        """The request has ended: its prompt stays while there is room, its answer goes."""
        pins, idle = self._pins[replica], self.idle[replica]
        for block in reversed(blocks):
            count = pins[block] - 1
            if count:
                pins[block] = count
            else:
                del pins[block]
                idle[block] = None
        self._private[replica] -= private

    def used_blocks(self, replica: int) -> int:
        """Return the blocks that running requests take."""
        return len(self._pins[replica]) + self._private[replica]
