"""What one exchange takes from its tenant's limits, and what it has used when it is over.

Engines report usage with nearly every answer. Where one does not (a stream that was not asked to,
one that was cut, a client that left), it is reckoned: the prompt as it was believed to be, and a
token for each event of the stream.
"""

from __future__ import annotations

from typing import Final

from typing_extensions import override

from proxy import errors
from proxy.contract.usage import UsageRecord
from proxy.core import admission, limits
from proxy.core.admission import Claim
from proxy.core.asked import Asked
from proxy.core.http1 import Field
from proxy.core.preamble import Preamble
from proxy.core.routes import PromptKind
from proxy.core.usage import Usage
from proxy.io.facts import Facts
from proxy.io.metering import Holding
from proxy.io.plane import Plane

_GENERATING: Final = (
    PromptKind.CHAT, PromptKind.COMPLETION, PromptKind.RESPONSES, PromptKind.ANTHROPIC,
)  # fmt: skip
# What engines answer without a computation that is worth counting.
_FREE: Final = ("tokenize", "count_tokens")
_EVENT: Final = b"\ndata:"  # no JSON has a line end within a text


class Metered(Facts):
    """The books of one exchange."""

    __slots__ = (
        "_bounded", "_claim", "_completion_tokens", "_events", "_holding", "_limit_fields",
        "_prompt_tokens",
    )  # fmt: skip

    def __init__(self, plane: Plane, preamble: Preamble, peer: str) -> None:
        super().__init__(plane, preamble, peer)
        self._claim: Claim | None = None
        self._holding: Holding | None = None
        self._limit_fields: list[Field] = []
        self._events = -1  # of the stream; below 0: nobody counts what this one uses
        self._prompt_tokens = self._completion_tokens = 0  # believed
        self._bounded = True  # the body says how long the answer may be, or it has no tokens

    def _meter(self, asked: Asked) -> None:
        """Take what it claims from its tenant's limits. Raises `ProxyError`."""
        metering, principal = self._plane.metering, self._principal
        if principal.crossed or not (principal.tenant or metering.log.enabled):
            return  # what has crossed is counted where it came in
        self._events = 0
        holding = metering.holding_of(principal)
        self._reckon(asked)
        if holding is None:
            return
        prices = metering.prices_of(self._priced_model())
        expected = Usage(self._prompt_tokens, self._completion_tokens, None)
        claim = Claim(
            self._prompt_tokens + self._completion_tokens,
            prices.of(expected),
            rated=principal.rated,
        )
        self._limit_fields, error = metering.take(holding, claim, principal.tenant)
        if error is not None:
            raise error
        self._claim, self._holding = claim, holding

    def _reckon(self, asked: Asked) -> None:
        """Believe how much it will use."""
        route = self._route
        assert route is not None
        if route.lookup or not route.json or route.name in _FREE:
            return
        self._prompt_tokens = self._plane.picture.prompt_tokens_of(self._request.chain, self._pool)
        if route.prompt in _GENERATING:
            self._bounded = asked.output_tokens > 0
            mean = self._plane.metering.mean_of(self._principal.tenant)
            self._completion_tokens = asked.output_tokens or mean

    @override
    def _diagnostics(self) -> tuple[Field, ...]:
        told = super()._diagnostics()
        return (*self._limit_fields, *told) if self._limit_fields else told

    def _priced_model(self) -> str:
        return self._model or self._plane.only_model()

    def _count_events(self, data: bytes) -> None:
        """Octets of an answer have come."""
        if self._events >= 0:
            self._events += data.count(_EVENT)

    def _settle(self, status: int, outcome: str) -> None:
        """It is over. Called once for each, also for those that nobody counts."""
        if self._events < 0:
            return
        metering = self._plane.metering
        usage, estimated = self._used(status, outcome)
        cost = metering.prices_of(self._priced_model()).of(usage) if usage is not None else 0
        begun = self._sent_s > 0.0
        if not self._bounded and usage is not None and not estimated:
            metering.learn(self._principal.tenant, usage.completion_tokens)
        claim, self._claim = self._claim, None
        if claim is not None:
            assert self._holding is not None
            metering.settle(self._holding, claim, usage, cost, begun=begun)
        if begun:
            self._write_usage(status, usage or Usage(0, 0, 0), cost, estimated=estimated)

    def _used(self, status: int, outcome: str) -> tuple[Usage | None, bool]:
        """Return what it used, and whether that is only believed; None: nothing was computed."""
        route = self._route
        if route is None or route.lookup or route.name in _FREE or not self._sent_s:
            return None, False
        if self._usage is not None:
            return self._usage, False
        if status != 200 and outcome != errors.CLIENT_GONE:
            return None, False
        completion_tokens = 0
        if route.prompt in _GENERATING:
            octets = 0 if self._stream else self._received_bytes
            completion_tokens = max(self._events, octets // limits.BYTES_PER_TOKEN)
        return Usage(self._prompt_tokens, completion_tokens, None), True

    def _write_usage(self, status: int, usage: Usage, cost: int, *, estimated: bool) -> None:
        """Count it for its tenant, and write the line of its key."""
        metering, principal = self._plane.metering, self._principal
        model = self._priced_model()
        if principal.tenant:
            metering.count(principal.tenant, model, usage, cost)
        if metering.log.enabled:
            metering.log.write(
                UsageRecord(
                    at=int(self._plane.clock.unix_s() * 1e3) / 1e3,
                    request_id=self.request_id.decode("ascii"),
                    tenant=principal.tenant,
                    key_id=principal.key_id,
                    model=model,
                    work_class=self._class_name(),
                    region=self._decision.replica.region if self._decision else "",
                    status=status,
                    prompt_tokens=usage.prompt_tokens,
                    cached_tokens=usage.cached_tokens or 0,
                    completion_tokens=usage.completion_tokens,
                    estimated=estimated,
                    cost=cost / admission.NANO,
                    stream=self._stream,
                )
            )
