"""`doherty keys usage`: what was used, summed from the usage records of proxies.

Records are lines of JSON (`proxy.contract.usage`), of one proxy or of several; a line that is none,
such as the last one of a file that is being written, is left out and counted. What is summed over
is chosen by names of columns; days are those of UTC, as those of budgets.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import msgspec

from proxy.contract.usage import UsageRecord, decode_usage

COLUMNS = ("tenant", "key", "model", "day", "class", "region")
BY = ("tenant", "key", "model", "day")
FIGURES = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "estimated", "cost")


class Sums(msgspec.Struct):
    """What requests have used together."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these
    completion_tokens: int = 0
    estimated: int = 0  # requests whose engine told no usage
    cost: float = 0.0

    def add(self, record: UsageRecord) -> None:
        self.requests += 1
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.completion_tokens += record.completion_tokens
        self.estimated += record.estimated
        self.cost += record.cost


class Usage:
    """Sums of records, by the values of some columns."""

    def __init__(
        self, by: Sequence[str], *, since_s: float = 0.0, tenant: str | None = None
    ) -> None:
        """`since_s` is Unix time; `tenant` leaves all others out."""
        self.by = tuple(by)
        self.sums: dict[tuple[str, ...], Sums] = {}
        self.unreadable = 0
        self._since_s, self._tenant = since_s, tenant

    def read(self, lines: Iterable[bytes]) -> None:
        """Add records, one a line."""
        for line in lines:
            if not line.strip():
                continue
            try:
                record = decode_usage(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                self.unreadable += 1
                continue
            if record.at >= self._since_s and self._tenant in (None, record.tenant):
                values = tuple(_value(record, column) for column in self.by)
                self.sums.setdefault(values, Sums()).add(record)

    def rows(self) -> list[tuple[str, ...]]:
        """Return a head and one row for each combination, in order."""
        rows = [(*self.by, *FIGURES)]
        for values, sums in sorted(self.sums.items()):
            figures = [getattr(sums, name) for name in FIGURES[:-1]]
            rows.append((*values, *map(str, figures), f"{sums.cost:.6f}"))
        return rows

    def as_csv(self) -> str:
        """Return the rows as RFC 4180 has them."""
        text = io.StringIO()
        csv.writer(text).writerows([_harmless(cell) for cell in row] for row in self.rows())
        return text.getvalue()

    def as_objects(self) -> list[dict[str, str | int | float]]:
        return [
            dict(zip(self.by, values, strict=True)) | msgspec.structs.asdict(sums)
            for values, sums in sorted(self.sums.items())
        ]

    def as_table(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        names = len(self.by)
        return "\n".join(
            "  ".join(
                cell.ljust(width) if number < names else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def _value(record: UsageRecord, column: str) -> str:
    match column:
        case "key":
            return record.key_id
        case "class":
            return record.work_class
        case "day":
            return datetime.fromtimestamp(record.at, UTC).date().isoformat()
        case _:
            return str(getattr(record, column))


def _harmless(cell: str) -> str:
    """Return a cell that no spreadsheet takes for a formula: a name may come from a token."""
    return f"'{cell}" if cell[:1] in {"=", "+", "-", "@", "\t", "\r"} else cell
