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
        str | None,
        bool | None,
        tuple[int, ...],
        tuple[int, ...],
        tuple[int, ...],
        tuple[int, ...],
        int,
    ]
    | None
): ...
def opener_end(
    octets: bytes, begin: int, end: int, search_bytes_max: int, opener_bytes_max: int, /
) -> int: ...
def usage(tail: bytes, /) -> tuple[int, int, int] | None: ...
