"""Time that stands still until a test moves it, and names that count from one."""

from __future__ import annotations

from typing_extensions import override

from proxy.io.clock import Clock


class FakeClock(Clock):
    """Starts at 1000 s, so that no moment is mistaken for 'never'."""

    def __init__(self) -> None:
        super().__init__()
        self.moment_s = 1000.0
        self.minted = 0

    @override
    def now_s(self) -> float:
        return self.moment_s

    @override
    def unix_s(self) -> float:
        return 1_700_000_000.0 + self.moment_s

    @override
    def draw(self) -> float:
        return 0.5

    @override
    def request_id(self) -> bytes:
        self.minted += 1
        return b"req-test-%08x" % self.minted

    def advance(self, seconds: float) -> None:
        self.moment_s += seconds
