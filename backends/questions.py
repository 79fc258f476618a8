"""What is asked of an engine while it lives, and what it has said of itself.

An answer belongs to the life that was asked: one that comes after the engine has ended, or has been
started anew, says nothing of its successor and is dropped (`begin` opens a life, `end` closes it).
Ranks and adapters keep their place over a restart, because proxies know them by it; the names that
it answers to and its load do not.
"""

from __future__ import annotations

import math

from backends.clock import Clock
from backends.engines.base import Engine
from backends.fetch import Answer, Fetch, Silence
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample, ReplicaRecord, with_load
from proxy.contract.engines import MODELS_PATH, Listing, read_listing

LISTING_INTERVAL_S = 15.0  # adapters come and go at run time
ASK_TIMEOUT_S = 5.0  # a metrics page behind a busy event loop takes its time


class Questions:
    """One replica's engine, as far as it answers."""

    def __init__(self, spec: ReplicaSpec, engine: Engine, fetch: Fetch, clock: Clock) -> None:
        self.spec = spec
        self.models: tuple[str, ...] = (spec.model,)
        self.load: LoadSample | None = None
        self.failures = 0  # readings of the load that came to nothing
        # What it has told, in its last life too: ranks keep their names over a restart.
        self.told = ReplicaRecord(replica_id=spec.replica_id, url="")
        self._engine = engine
        self._fetch = fetch
        self._clock = clock
        self._adapters: tuple[str, ...] | None = None
        self._listed_s = 0.0
        self._url = ""
        self._life: object = None

    def begin(self, url: str) -> None:
        """A new life listens at `url`; nothing is known of it."""
        self._life = object()
        self._url = url
        self.load = None
        self.models, self._adapters = (self.spec.model,), None

    def end(self) -> None:
        self._life = None
        self.load = None

    async def probe(self, timeout_s: float = ASK_TIMEOUT_S) -> Answer:
        """Ask whether it is ready. The first path that the engine knows decides."""
        answer = Answer(0, silence=Silence.REFUSED)
        for path in self._engine.ready_paths(self.spec):
            answer = await self._fetch.get(self._url + path, timeout_s)
            if answer.status != 404:
                break
        return answer

    @property
    def gives_back(self) -> bool:
        """Whether it gives back what it has not done, so that nobody waits for it to be idle."""
        return self._engine.facts(self.spec).serves == "jobs"

    @property
    def listing_due(self) -> bool:
        return self._clock.now_s() - self._listed_s >= LISTING_INTERVAL_S

    def outdate_listing(self) -> None:
        """It may answer to other names now."""
        self._listed_s = -math.inf

    async def list(self) -> None:
        """Learn which names it answers to."""
        life, self._listed_s = self._life, self._clock.now_s()
        answer = await self._fetch.get(self._url + MODELS_PATH, ASK_TIMEOUT_S)
        listing = read_listing(answer.body) if answer.status == 200 else None
        if life is self._life and listing is not None and listing.names:
            self.models, self._adapters = _names(self.spec.model, listing), listing.adapters

    async def read(self) -> tuple[bool, LoadSample | None]:
        """Take one reading of the load; say whether the engine answered anything at all."""
        life = self._life
        answers = [
            await self._fetch.get(self._url + path, ASK_TIMEOUT_S)
            for path in self._engine.load_paths(self.spec)
        ]
        bodies = [answer.body if answer.status == 200 else b"" for answer in answers]
        load = self._engine.read_load(bodies, self._clock.unix_s())
        if life is not self._life:
            return False, None
        if load is not None:
            self.told = with_load(self.told, load, self._adapters, anew=self.load is None)
            self.load = load
            return True, load
        self.failures += 1
        answered = any(answer.status for answer in answers)
        return answered or (await self.probe()).status > 0, None


def _names(model: str, listing: Listing) -> tuple[str, ...]:
    """Return what it answers to: the name that it was started by, whatever it lists.

    SGLang lists the path instead once it has read its weights again (`_update_model_path_info` in
    managers/tokenizer_manager.py, 0.5.17), and goes on answering to any name.
    """
    if model in listing.names:
        return listing.names
    return (model, *(listing.adapters or ()))
