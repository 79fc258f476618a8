"""All client vectors. What is in them stands in the `request_*` files, by class."""

from __future__ import annotations

from tests.conformance import request_chunks, request_fields, request_framing, request_lines
from tests.conformance.vector import Vector

REQUESTS: tuple[Vector, ...] = (
    *request_framing.BASE,
    *request_framing.CONFLICT,
    *request_framing.CODING,
    *request_framing.LENGTHS,
    *request_chunks.CHUNKS,
    *request_fields.FIELDS,
    *request_fields.HOSTS,
    *request_fields.HOPS,
    *request_fields.EXPECTATIONS,
    *request_lines.LINES,
    *request_lines.LIMITS,
    *request_lines.PATHS,
    *request_lines.AIMED,
    *request_lines.FOREIGN,
)
