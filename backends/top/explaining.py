"""A dry run of a request as text: which replica it would go to, and each one's price.

The proxy's answer is its own business and may grow; what is not known here is left out, and where
nothing is known the answer is shown as it came.
"""

from __future__ import annotations

import json
from typing import Any

from backends.top import words
from backends.top.table import Column, Row, Table, cell, fit, heading, line

PATHS = {
    "messages": "/v1/chat/completions",
    "input": "/v1/responses",
    "prompt": "/v1/completions",
}
# Columns that say most, in their order; the other terms follow where there is room.
_FIRST = ("replica", "may_take", "price_s", "wait_s", "prefill_s", "cached_tokens")
_WORDS = ("region", "state")  # of no use beside those


def sample_body(model: str) -> bytes:
    """Return a request to explain where the operator has none at hand."""
    message = {"role": "user", "content": "Where would this go?"}
    return json.dumps({"model": model, "messages": [message], "stream": True}).encode()


def path_of(body: bytes) -> str:
    """Return the path that such a body is meant for, by its keys. Raises `ValueError`."""
    value = json.loads(body)
    if not isinstance(value, dict):
        raise TypeError("expected a JSON object")
    return next((path for key, path in PATHS.items() if key in value), "/v1/chat/completions")


def explained(answer: bytes, width: int) -> str:
    """Return what a dry run said, in words and a table of so many columns."""
    try:
        value = json.loads(answer)
    except ValueError:
        return words.printable(answer.decode(errors="replace"))
    if not isinstance(value, dict):
        return json.dumps(value, indent=2)
    if isinstance(error := value.get("error"), dict) and "decision" not in value:
        return f"it would be refused: {words.printable(str(error.get('message', error)))}"
    parts = [_first(value), _decision(value)]
    candidates = value.get("candidates")
    if isinstance(candidates, list) and candidates:
        parts.append(_table([one for one in candidates if isinstance(one, dict)], width))
    return "\n\n".join(part for part in parts if part)


def _first(value: dict[str, Any]) -> str:
    names = ("model", "class", "tenant", "policy", "route")
    known = [f"{name} {value[name]}" for name in names if value.get(name) not in (None, "")]
    chain = value.get("chain")
    if isinstance(chain, dict):
        known.append(f"prompt {words.octets(chain.get('prompt_octets'))}")
    return words.printable("  ".join(known))


def _decision(value: dict[str, Any]) -> str:
    decision = value.get("decision")
    if not isinstance(decision, dict):
        why = "held until a replica is up" if value.get("held") else "nobody may take it now"
        error = value.get("error")
        said = error.get("error", error) if isinstance(error, dict) else {}
        message = said.get("message", "") if isinstance(said, dict) else ""
        return words.printable(f"goes nowhere: {message or why}")
    lines = [f"goes to {decision.get('replica')}, because: {decision.get('reason')}"]
    found = [(name, term) for name, term in decision.items() if isinstance(term, int | float)]
    terms = [
        f"{name.removesuffix('_s').replace('_', ' ')} {words.seconds(term)}"
        for name, term in found
        if name.endswith("_s") and name != "price_s" and term
    ]
    price = decision.get("price_s")
    if isinstance(price, int | float):
        lines.append(f"price {words.seconds(price)}: " + (" + ".join(terms) or "no term costs"))
    others = [f"{name.replace('_', ' ')} {_number(name, term)}" for name, term in found]
    tokens = [text for text in others if "tokens" in text or "octets" in text]
    return "\n".join(map(words.printable, (*lines, ", ".join(tokens))))


def _table(candidates: list[dict[str, Any]], width: int) -> str:
    """Return one row for each candidate, one column for each term that costs any of them."""
    names = [name for name in _FIRST if any(name in one for one in candidates)]
    for one in candidates:
        known = [name for name, value in one.items() if value and name not in _WORDS]
        names += [name for name in known if name not in names]
    if "reason" in names:  # a column of words stands last
        names = [name for name in names if name != "reason"] + ["reason"]
    columns = tuple(
        Column(name, rank=0 if name in {*_FIRST[:3], "reason"} else 1 + at, right=name != "replica")
        for at, name in enumerate(names)
    )
    rows = tuple(
        Row(str(at), tuple(cell(_number(name, one.get(name))) for name in names))
        for at, one in enumerate(candidates)
    )
    table = Table("candidates", columns, rows)
    fitted = fit(table, width)
    return "\n".join([heading(table, fitted), *(line(table, fitted, row) for row in rows)])


def _number(name: str, value: object) -> str:
    if value is None:
        return words.UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and name.endswith("_s"):
        return words.seconds(value)
    if isinstance(value, float):
        return words.rate(value)
    return str(value)
