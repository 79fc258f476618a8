"""What one manager knows of images: which pools have one, and if one is being made.

Which image a pool's next start would take is known from the store as soon as the pool is, and from
then on from whoever looks for one at a start, makes one, or finds that it is bad.

One dump at a time: it takes the disk and the host's memory whole, and replicas of one pool would
make the same image twice. Who finds the place taken serves without one.
"""

from __future__ import annotations

from collections.abc import Collection

from backends.snapshots.base import Snapshot, SnapshotKey


class Shelf:
    """As bounded as the pools are."""

    def __init__(self) -> None:
        self.making = False
        self._images: dict[str, Snapshot] = {}  # by pool: what its next start would take

    def keep(self, pool_ids: Collection[str]) -> None:
        """Forget all other pools."""
        for gone in self._images.keys() - set(pool_ids):
            del self._images[gone]

    def put(self, pool_id: str, image: Snapshot | None) -> None:
        """Note what a pool's next start would take; None: nothing."""
        self._images.pop(pool_id, None)
        if image is not None:
            self._images[pool_id] = image

    def has(self, pool_id: str, key: SnapshotKey | None = None) -> bool:
        """Say whether a pool has an image; with `key`, one of just this."""
        image = self._images.get(pool_id)
        return image is not None and key in {None, image.key}

    def drop(self, snapshot_id: str) -> None:
        """Nobody's next start would take this image any more."""
        held = [pool for pool, image in self._images.items() if image.snapshot_id == snapshot_id]
        for pool_id in held:
            del self._images[pool_id]
