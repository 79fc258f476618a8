"""All engine vectors. What is in them stands in the `engine_*` files, by class."""

from __future__ import annotations

from tests.conformance import engine_bodies, engine_heads
from tests.conformance.vector import EngineVector

ENGINE: tuple[EngineVector, ...] = (
    *engine_bodies.RIGHT,
    *engine_bodies.SURPLUS,
    *engine_bodies.CUTS,
    *engine_bodies.BAD,
    *engine_heads.FRAMING,
    *engine_heads.LINES,
    *engine_heads.FIELDS,
    *engine_heads.HOPS,
)
