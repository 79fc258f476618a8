"""What the arbiter has decided, in words: a line for each pool, and under it what happens to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from backends.claims import Lower, Move, Raise, Verdict


def explain(verdict: Verdict) -> tuple[str, ...]:
    """Return the lines; pools for which all is as it should be are told of in one line each."""
    return tuple(line for pool in verdict.terms for line in _about(pool, verdict))


def _about(pool: str, verdict: Verdict) -> Iterator[str]:
    yield f"{pool}: {_figures(verdict.terms[pool])}"
    for move in verdict.moves:
        if move.pool == pool:
            yield f"  {_move(move)}"
    for refusal in verdict.refused:
        if refusal.pool == pool:
            yield f"  lacks {refusal.missing}: {refusal.reason}"


def _figures(terms: Mapping[str, float]) -> str:
    said = [
        f"{terms['serving']:.0f} serve or come",
        f"{terms['wants']:.0f} wanted",
        f"{terms['share']:.0f} allowed",
    ]
    if terms["queued"]:
        said.append(f"{terms['queued']:.0f} requests wait")
    if terms["unserved_s"]:
        said.append(f"without a replica for {terms['unserved_s']:.0f} s")
    return ", ".join(said)


def _move(move: Move) -> str:
    match move:
        case Raise(replica_id=None):
            return f"a new replica comes, {move.rung.value}{_on(move.devices)}"
        case Raise():
            return f"{move.replica_id} comes back, {move.rung.value} so far{_on(move.devices)}"
        case Lower():
            cut = "; its requests are asked again elsewhere" if move.cut else ""
            return f"{move.replica_id} goes down to {move.rung.value}: {move.reason}{cut}"
        case _:
            return f"one more waits: {move.reason}"


def _on(devices: tuple[str, ...]) -> str:
    if not devices:
        return ""
    return (", on GPU " if len(devices) == 1 else ", on GPUs ") + ", ".join(devices)
