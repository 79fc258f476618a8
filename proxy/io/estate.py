"""What a proxy has counted goes on to the one that takes over from it: no upgrade lowers a counter.

The one that leaves still finishes what it has, and each second tells all that it has counted, the
whole and never a difference, over the link between the two; a last time when its workers have
ended. The new one adds that to its own. Its page must not be read before it has heard the first of
it: a counter that begins low and then jumps would look like as many requests at once. Where nothing
is heard in time it begins at zero, as any new process does, and takes nothing later.

Gauges are each process' own, and the processor time of a worker ends with it. Labels that somebody
chooses are capped, as in a worker (`io/telemetry.py`), over any number of proxies before: models
and replicas that come and go would else add up with every upgrade.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Final

import msgspec

from proxy.core import claim_limits, limits, peer_wire
from proxy.io.exposition import sum_samples
from proxy.io.families import FAMILIES
from proxy.io.peer_link import PeerLink
from proxy.io.peers import PREDECESSOR, SUCCESSOR, Peers
from proxy.io.telemetry import Labels, Sample

_log = logging.getLogger("doherty.proxy")

TELL_INTERVAL_S: Final = 1.0
LINK_INTERVAL_S: Final = 0.02  # while the link comes about
FIRST_TIMEOUT_S: Final = limits.PEER_HANDSHAKE_TIMEOUT_S
PART_BYTES_MAX: Final = limits.PEER_FRAME_BYTES_MAX // 2
SAMPLES_MAX: Final = 200_000  # of one telling; bounded series of bounded workers are far fewer
_OF_A_PROCESS: Final = frozenset(("worker_cpu_seconds_total",))
OTHER: Final = "other"
# How many values, or pairs of values, labels of these names may have.
_CAPS: Final = {
    ("route", "model"): limits.REQUEST_SERIES_MAX,
    ("tenant", "model"): claim_limits.TENANT_SERIES_MAX,
    ("tenant", "limit"): claim_limits.TENANT_SERIES_MAX,
    ("replica",): 4096,
}
_KEPT: Final = frozenset(("route", "limit"))  # of few values by themselves
Count = Callable[[], Awaitable[list[Sample]]]


class Part(msgspec.Struct, array_like=True, frozen=True):
    """A piece of a telling; the last completes it."""

    samples: list[Sample]
    last: bool


_decoder = msgspec.msgpack.Decoder(Part)


class Caps:
    """Who is counted by name: whoever was heard of first."""

    def __init__(self) -> None:
        self._named: dict[tuple[str, ...], set[Labels]] = {}

    def within(self, sample: Sample) -> Sample:
        """Return the sample, or, of one too many, the same of the others."""
        for names, most in _CAPS.items():
            labels = sample.labels[: len(names)]
            if tuple([name for name, _ in labels]) != names:
                continue
            named = self._named.setdefault(names, set())
            if labels in named or len(named) < most:
                named.add(labels)
                return sample
            others = tuple([(n, value if n in _KEPT else OTHER) for n, value in labels])
            rest = sample.labels[len(names) :]
            return msgspec.structs.replace(sample, labels=(*others, *rest))
        return sample


class Estate:
    """Both ends: what is left behind, and what was inherited."""

    def __init__(self, peers: Peers, count: Count) -> None:
        """`count()` returns every counter of this proxy, what it has inherited among them."""
        self._peers = peers
        self._count = count
        self._inherited: list[Sample] = []
        self._parts: list[Sample] = []
        self._caps = Caps()
        self._heard = asyncio.Event()
        self._too_late = False
        peers.listen(peer_wire.COUNTS, self._hear)

    def samples(self) -> list[Sample]:
        """Return the counters of the proxies before."""
        return self._inherited

    # --- of the one before -------------------------------------------------------------------

    async def wait(self) -> None:
        """Wait until the proxy before has told what it has counted, or does not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TIMEOUT_S):
                while not (self._heard.is_set() or self._peers.is_over(PREDECESSOR)):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._heard.wait(), LINK_INTERVAL_S)
        self._too_late = not self._heard.is_set()
        if self._too_late:
            _log.warning("the proxy before has not told its counts; they begin at zero")

    def _hear(self, link: PeerLink, octets: bytes) -> None:
        """The proxy before tells. Raises `WireError`."""
        if link.name != PREDECESSOR or self._too_late:
            return
        try:
            part = _decoder.decode(octets)
        except msgspec.MsgspecError as error:
            raise peer_wire.WireError("counts that cannot be read") from error
        self._parts += part.samples
        if len(self._parts) > SAMPLES_MAX:
            raise peer_wire.WireError("counts without end")
        if part.last:
            within = map(self._caps.within, _known(self._parts))
            self._inherited, self._parts = sum_samples(within), []
            self._heard.set()

    # --- to the one after --------------------------------------------------------------------

    async def run(self) -> None:
        """Tell who takes over, until cancelled."""
        while True:
            told = await self._tell()
            await asyncio.sleep(TELL_INTERVAL_S if told else LINK_INTERVAL_S)

    async def farewell(self) -> None:
        """Nothing happens here any more: tell it all for the last time."""
        await self._tell(at_any_rate=True)

    async def _tell(self, *, at_any_rate: bool = False) -> bool:
        """Say whether there was somebody to tell. One that is behind gets the next."""
        link = next((each for each in self._peers.links() if each.name == SUCCESSOR), None)
        if link is None:
            return False
        if at_any_rate or link.waiting_bytes <= PART_BYTES_MAX:
            counted = sum_samples(await self._count())
            for part in parts_of([each for each in counted if each.name not in _OF_A_PROCESS]):
                link.send(peer_wire.write_message(peer_wire.COUNTS, part))
        return True


def _known(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Leave out what another version counts in another way."""
    for sample in samples:
        family = FAMILIES.get(sample.name)
        buckets = len(family.edges) + 1 if family is not None and family.edges else 0
        if family is not None and len(sample.buckets) == buckets:
            said = {name for name, _ in sample.labels}
            if said == set(family.labels):
                yield sample


def parts_of(samples: list[Sample]) -> Iterator[bytes]:
    """Yield the encoded parts of a telling, each small enough for a frame."""
    part: list[Sample] = []
    part_bytes = 0
    for sample in samples:
        size = len(msgspec.msgpack.encode(sample))
        if part and part_bytes + size > PART_BYTES_MAX:
            yield msgspec.msgpack.encode(Part(part, last=False))
            part, part_bytes = [], 0
        part.append(sample)
        part_bytes += size
    yield msgspec.msgpack.encode(Part(part, last=True))
