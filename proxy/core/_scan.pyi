# `_scan.c`, which `doherty compile` builds.

def scan(
    body: bytes, /
) -> (
    tuple[
        str,
        str | None,
        str | None,
        str | None,
        str | None,
        str | None,
        bool | None,
        tuple[int, ...],
    ]
    | None
): ...
