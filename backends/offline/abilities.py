"""Which requests engine workers understand, by what they said when they asked for lines.

What a model can do only its engine knows: one that makes embeddings does no chats. A batch of
requests that nobody understands would wait for its window to end, and would keep workers up all the
while that can do nothing for it. So what workers say is remembered here, for `REMEMBERED_S` after
the last of them asked: longer than any of them is away for want of work, and not for ever, because
the next may be another engine. A model of which no worker has asked yet is not judged.
"""

from __future__ import annotations

from backends.offline.work import Ask

REMEMBERED_S = 3600.0
MODELS_MAX = 10_000
URLS_MAX = 16  # of a model


class Abilities:
    """By model, the paths of requests, each with when a worker said last that it understands it."""

    def __init__(self) -> None:
        self._said: dict[str, dict[str, float]] = {}

    def note(self, ask: Ask, now_s: float) -> None:
        """Take what an engine worker says of itself; a dispatcher speaks for nobody."""
        if ask.spare:
            return
        for model in ask.models:
            if model not in self._said and len(self._said) >= MODELS_MAX:
                continue
            said = self._said.setdefault(model, {})
            for url in ask.urls:
                if url in said or len(said) < URLS_MAX:
                    said[url] = now_s

    def forget(self) -> None:
        """The models may be served otherwise now."""
        self._said.clear()

    def urls(self, now_s: float) -> dict[str, tuple[str, ...]]:
        """Return what is understood, by model."""
        for model, said in list(self._said.items()):
            for url in [url for url, at_s in said.items() if now_s - at_s > REMEMBERED_S]:
                del said[url]
            if not said:
                del self._said[model]
        return {model: tuple(sorted(said)) for model, said in self._said.items()}

    def lacks(self, model: str, url: str, now_s: float) -> bool:
        """Say whether workers of the model are known, and none of them understands this."""
        understood = self.urls(now_s).get(model, ())
        return bool(understood) and url not in understood


def problem_of(model: str, url: str) -> str:
    """Say in words that nobody can do the lines of a batch."""
    return (
        f"no engine worker of {model} understands {url}, and no replica serves that model: "
        "the lines wait, until the batch expires, for one that does"
    )
