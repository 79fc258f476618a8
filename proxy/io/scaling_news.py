"""Pools and the decisions of their scaling, asked of the manager while somebody looks.

A manager that does not answer takes nothing back: what it told last is shown with its age. Without
a manager there are no pools and no decisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import aiohttp
import msgspec

from proxy.contract.bodies import whole_body
from proxy.contract.scaling import SCALING_BYTES_MAX, SCALING_PATH, ToldScaling, decode_told
from proxy.contract.view import NOTES_MAX, POOLS_MAX, NoteView, PoolView

TIMEOUT = aiohttp.ClientTimeout(total=2.0)
UNTOLD = (aiohttp.ClientError, TimeoutError, OSError, ValueError)  # one too long, too


class ScalingNews:
    """One reader of one manager."""

    def __init__(
        self,
        session: Callable[[], aiohttp.ClientSession],
        url: Callable[[], str | None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`session()` is the client to ask by, and `url()` whom to ask; None: nobody."""
        self._session = session
        self._url = url
        self._now_s = now_s
        self._asked = ""  # whose report this is
        self._told = ToldScaling()
        self._told_s: float | None = None

    async def ask(self) -> None:
        """Ask for news. Whatever comes of it, it is no error of ours."""
        url = self._url()
        if url != self._asked:
            self._asked, self._told, self._told_s = url or "", ToldScaling(), None
        if url is None:
            return
        try:
            async with self._session().get(url.rstrip("/") + SCALING_PATH, timeout=TIMEOUT) as got:
                if got.status != 200:
                    return
                told = decode_told(await whole_body(got, SCALING_BYTES_MAX))
        except (*UNTOLD, msgspec.MsgspecError):
            return
        if url == self._asked:
            self._told, self._told_s = told, self._now_s()

    @property
    def age_s(self) -> float | None:
        """Return how old this is; None: nothing was ever told."""
        return None if self._told_s is None else round(self._now_s() - self._told_s, 3)

    def pools(self) -> tuple[PoolView, ...]:
        """Return the pools by name."""
        return tuple(
            [
                PoolView(
                    pool=pool.pool,
                    model=pool.model,
                    work_class=pool.work_class,
                    scaled=pool.scaled,
                    min=pool.min,
                    max=pool.max,
                    desired=pool.desired,
                    ready=pool.ready,
                    coming=pool.coming,
                    going=pool.going,
                    resting=len(pool.resting),
                    waiting=pool.waiting,
                )
                for pool in sorted(self._told.pools, key=lambda pool: pool.pool)[:POOLS_MAX]
            ]
        )

    def notes(self) -> tuple[NoteView, ...]:
        """Return the newest decisions of all pools, the newest first."""
        notes = [
            NoteView(
                at_s=round(note.at_s, 3),
                pool=note.pool or pool.pool,
                was=note.was,
                desired=note.desired,
                reason=note.reason,
                moves=note.moves,
            )
            for pool in self._told.pools
            for note in pool.notes
        ]
        return tuple(sorted(notes, key=lambda note: -note.at_s)[:NOTES_MAX])
