"""What several command lines understand alike. Imports nothing that takes time."""

from __future__ import annotations

import argparse

REPLICAS_MAX = 4096  # of one pool, as the configuration has it; that module takes its time


def port_number(text: str) -> int:
    """Return the port in `text`, 0 for any that is free; an argparse type."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"'{text}' is not a port; use 0 to 65535")
    return int(text)


def replica_count(text: str) -> int:
    """Return the number of replicas in `text`; an argparse type."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) <= REPLICAS_MAX):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no number of replicas; use 0 to {REPLICAS_MAX}"
        )
    return int(text)


def mebibytes(text: str) -> int:
    """Return the MiB in `text`; an argparse type."""
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is no number of MiB; use 0 or more")
    return int(text)
