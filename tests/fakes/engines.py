"""The simulated engines of one model, as a test looks into them and makes them misbehave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.fakes.programs import fetch, until

# What stops an engine from computing and keeps what it has, and what lets it go on.
_PAUSE = {
    "vllm": ("/pause?mode=keep&clear_cache=false", b""),
    "sglang": ("/pause_generation", b'{"mode": "in_place"}'),
}
_RESUME = {"vllm": "/resume", "sglang": "/continue_generation"}

Counts = dict[str, int]


class Engines:
    """Every replica of one model; figures are sums over them."""

    def __init__(self, dialect: str, model: str, urls: Sequence[str]) -> None:
        self.dialect = dialect
        self.model = model
        self.urls = tuple(urls)

    def counts(self) -> Counts:
        """Return the sums of the engines' internals."""
        states = [fetch(url + "/simulator/state").value for url in self.urls]
        return {
            name: sum(state[name] for state in states)
            for name in ("running", "waiting", "in_flight", "requests", "aborted", "finished")
        }

    def until(self, claim: Callable[[Counts], bool], what: str) -> Counts:
        """Wait until `claim` holds of the counts; return them."""

        def counts() -> Counts | None:
            found = self.counts()
            return found if claim(found) else None

        return until(counts, f"{what}; {self.counts()}")

    def until_idle(self) -> Counts:
        """Wait until nothing is computed, queued or answered."""
        return self.until(
            lambda c: not (c["running"] or c["waiting"] or c["in_flight"]), "idle engines"
        )

    @contextmanager
    def faulty(self, *faults: str) -> Iterator[None]:
        """Put faults in force on every replica, and take them back."""
        self._set(faults)
        try:
            yield
        finally:
            self._set(())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let requests come in and wait, and nothing be computed."""
        path, body = _PAUSE[self.dialect]
        self._post(path, body)
        try:
            yield
        finally:
            self._post(_RESUME[self.dialect], b"")

    def _set(self, faults: Sequence[str]) -> None:
        self._post("/simulator/faults", json.dumps({"faults": list(faults)}).encode())

    def _post(self, path: str, body: bytes) -> None:
        for url in self.urls:
            answer = fetch(url + path, body)
            assert answer.status == 200, answer


def message(content: Any, role: str = "user") -> Any:
    """Return one chat message, typed so that every client's parameter takes it."""
    return {"role": role, "content": content}
