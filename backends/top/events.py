"""Server-sent events out of pieces of a stream (HTML Living Standard, 9.2.6), bounded.

Only the data of one kind of event is wanted; comments, ids and retry times of others pass by. A
stream whose event never ends is given up, so that a wrong address cannot fill the memory.
"""

from __future__ import annotations

EVENT_BYTES_MAX = 8 * 1024 * 1024  # a view of 500 replicas has a twentieth of it


class EventTooLongError(ValueError):
    """An event has more octets than any view."""

    def __init__(self) -> None:
        super().__init__(f"an event of more than {EVENT_BYTES_MAX} octets is no view")


class Events:
    """Feed it pieces as they come; it returns the data of the events that are whole by then."""

    def __init__(self, wanted: bytes) -> None:
        self._wanted = wanted
        self._rest = b""
        self._kind = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of whole events. Raises `EventTooLongError`."""
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        found = [data for line in lines if (data := self._line(line.removesuffix(b"\r")))]
        if len(self._rest) + self._size > EVENT_BYTES_MAX:
            raise EventTooLongError
        return found

    def _line(self, line: bytes) -> bytes:
        if not line:
            data, kind = b"\n".join(self._data), self._kind
            self._data, self._kind, self._size = [], b"", 0
            return data if kind == self._wanted else b""
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            self._kind = value
        elif name == b"data":
            self._data.append(value)
            self._size += len(value)
        return b""
