"""Why no plan can be made, for a person to read."""

from __future__ import annotations


class PlanError(Exception):
    """Nothing can be planned; the text says what is in the way and what would do."""


class RequestError(PlanError):
    """The question itself is wrong: a GPU, a model or a number that there is not."""
