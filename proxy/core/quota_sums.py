"""What proxies tell each other of their tenants' use, and what that comes to.

Each tells what its own workers have, a few times a second and only what has changed; the sum of all
others counts for every limit beside what is here. So over several proxies a limit may be exceeded
by what all can begin between two tellings, and within one it never is.

A proxy that is gone still counts: its minute for a minute more, its day to the end of the day. One
that takes over from another, or is started again with what was kept of the day, tells this day's
sums as its own, and names the lives whose sums they are: those then count no more by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from proxy.core.peer_wire import PROXY_ID_BYTES, WireError
from proxy.core.quota import ROWS_MAX, WINDOW_S

TENANTS_MAX: Final = 2 * ROWS_MAX  # of one proxy: it may have given its rows to others
SUMS_MAX: Final = 1000  # of one message; who has more sends more messages
LIVES_MAX: Final = 32
PROXIES_MAX: Final = 256  # remembered, those that are gone among them
COUNT_MAX: Final = 2**62 - 1  # so that those of others and ours fit together, in 64 bits

_Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
_Life = Annotated[bytes, Meta(min_length=PROXY_ID_BYTES, max_length=PROXY_ID_BYTES)]


class Sums(msgspec.Struct, frozen=True, array_like=True):
    """One tenant's counts at one proxy; `quota` says what each is."""

    tenant: Annotated[str, Meta(max_length=128)]
    requests: _Count = 0
    tokens: _Count = 0
    concurrent: _Count = 0
    held_tokens: _Count = 0
    held_cost: _Count = 0
    day: _Count = 0
    day_tokens: _Count = 0
    day_cost: _Count = 0


class Telling(msgspec.Struct, frozen=True, array_like=True):
    """One message. `lives` are those whose day's sums are in these, too."""

    lives: Annotated[list[_Life], Meta(max_length=LIVES_MAX)]
    sums: Annotated[list[Sums], Meta(max_length=SUMS_MAX)]


_decoder: Final = msgspec.msgpack.Decoder(Telling)
_encoder: Final = msgspec.msgpack.Encoder()


def write_tellings(lives: Iterable[bytes], sums: list[Sums]) -> list[bytes]:
    """Return the messages that say this; at least one."""
    named = list(lives)[-LIVES_MAX:]
    parts = [sums[at : at + SUMS_MAX] for at in range(0, len(sums), SUMS_MAX)] or [[]]
    return [_encoder.encode(Telling(named, part)) for part in parts]


def read_telling(octets: bytes) -> Telling:
    """Raises `WireError`."""
    try:
        return _decoder.decode(octets)
    except (msgspec.MsgspecError, ValueError) as fault:  # text that is no UTF-8 is the latter
        raise WireError("what it tells of its tenants cannot be read") from fault


class _Proxy:
    """What another proxy has told."""

    def __init__(self) -> None:
        self.told: dict[str, Sums] = {}
        self.gone_s = -1.0  # below 0: it is linked
        self.carried = False  # its day is in another's sums


class Elsewhere:
    """What all other proxies have."""

    def __init__(self) -> None:
        self._proxies: dict[bytes, _Proxy] = {}
        self._carried: set[bytes] = set()  # lives that others go on with
        self._touched: set[str] = set()

    def hear(self, life: bytes, telling: Telling) -> None:
        """The proxy of this life says so. Raises `WireError`."""
        proxy = self._proxies.get(life)
        if proxy is None:
            if len(self._proxies) >= PROXIES_MAX and not self._forget_one():
                raise WireError("more proxies tell of tenants than can be heard")
            proxy = self._proxies[life] = _Proxy()
            proxy.carried = life in self._carried
        proxy.gone_s = -1.0
        for sums in telling.sums:
            if len(proxy.told) >= TENANTS_MAX and sums.tenant not in proxy.told:
                raise WireError("it tells of more tenants than a proxy can have")
            proxy.told[sums.tenant] = sums
            self._touched.add(sums.tenant)
        for other in telling.lives:
            self.carry(other)

    def carry(self, life: bytes) -> None:
        """The day of this life is in the sums of another."""
        if life not in self._carried:
            if len(self._carried) >= PROXIES_MAX * LIVES_MAX:
                self._carried.clear()  # of proxies that are long gone
            self._carried.add(life)
        proxy = self._proxies.get(life)
        if proxy is not None and not proxy.carried:
            proxy.carried = True
            self._touched.update(proxy.told)

    def gone(self, life: bytes, now_s: float) -> None:
        """Nothing more will be heard of it by this link."""
        proxy = self._proxies.get(life)
        if proxy is not None:
            proxy.gone_s = now_s
            self._touched.update(proxy.told)

    def told_by(self, life: bytes) -> dict[str, Sums]:
        proxy = self._proxies.get(life)
        return proxy.told if proxy is not None else {}

    def sweep(self, now_s: float, today: int) -> None:
        """Forget what counts no more."""
        for life, proxy in list(self._proxies.items()):
            if proxy.gone_s < 0.0 or now_s - proxy.gone_s <= WINDOW_S:
                continue
            self._touched.update(proxy.told)
            of_today = any(sums.day == today for sums in proxy.told.values())
            if proxy.carried or not of_today:
                del self._proxies[life]

    def take_touched(self) -> set[str]:
        """Return the tenants of whom something may have changed since this was asked last."""
        touched, self._touched = self._touched, set()
        return touched

    def total(self, tenant: str, now_s: float, today: int) -> Sums:
        """Return what all other proxies together have of a tenant."""
        requests = tokens = concurrent = held_tokens = held_cost = day_tokens = day_cost = 0
        for proxy in self._proxies.values():
            told = proxy.told.get(tenant)
            if told is None:
                continue
            linked = proxy.gone_s < 0.0
            if linked or now_s - proxy.gone_s <= WINDOW_S:
                requests += told.requests
                tokens += told.tokens
            if linked:
                concurrent += told.concurrent
                held_tokens += told.held_tokens
                held_cost += told.held_cost
            if told.day == today and not proxy.carried:
                day_tokens += told.day_tokens
                day_cost += told.day_cost
        return Sums(
            tenant,
            min(COUNT_MAX, requests),
            min(COUNT_MAX, tokens),
            min(COUNT_MAX, concurrent),
            min(COUNT_MAX, held_tokens),
            min(COUNT_MAX, held_cost),
            today,
            min(COUNT_MAX, day_tokens),
            min(COUNT_MAX, day_cost),
        )

    def _forget_one(self) -> bool:
        """Make room: of those that are gone the first goes."""
        for life, proxy in self._proxies.items():
            if proxy.gone_s >= 0.0:
                self._touched.update(proxy.told)
                del self._proxies[life]
                return True
        return False
