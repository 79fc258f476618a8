"""What a request asks for once its body is whole, and what it may have of that.

Reading the body is `core.asked`'s, what its sender may claim `core.claims`'; here is what both need
to know of this proxy.
"""

from __future__ import annotations

from typing import Final

from typing_extensions import override

from proxy.config import ProxyConfig
from proxy.core.additions import fields_for, names_priority, salt_of_key
from proxy.core.asked import Asked, read_body
from proxy.core.claims import lay, may_ask, regions_of, tier_used
from proxy.core.classes import ONLINE, UNSAID
from proxy.core.preamble import Preamble
from proxy.core.principal import ANYBODY, Principal
from proxy.core.routes import PromptKind, Route
from proxy.errors import InvalidRequestError
from proxy.io.clock import Clock
from proxy.io.refusal import Refusal

# In whose answers a tier is told. Anthropic's has words of its own, in `usage`.
_TOLD: Final = (PromptKind.CHAT, PromptKind.COMPLETION, PromptKind.RESPONSES)


class Reading(Refusal):
    """One that reads requests."""

    def __init__(self, config: ProxyConfig, clock: Clock) -> None:
        super().__init__(config, clock)
        self._model_regions = _regions_of_models(config)

    @override
    def follow(self, config: ProxyConfig) -> None:
        super().follow(config)
        self._model_regions = _regions_of_models(config)

    def read(
        self,
        route: Route,
        preamble: Preamble,
        body: bytes,
        principal: Principal = ANYBODY,
        arrived_s: float = 0.0,
    ) -> Asked:
        """Read what a whole request asks for. Raises the kinds of `InvalidRequestError`.

        `arrived_s` is when its head came: what it wants by a time it wants from then on.
        """
        salt = self.salt_of(principal, preamble)
        asked = read_body(
            route,
            preamble,
            body,
            strict=self.strict,
            tenant=salt.encode(),
            adapters=self.fleet.adapters,
        )
        request = asked.request
        asked_class, pool_class = request.work_class, ONLINE
        if asked_class == UNSAID and self.fleet.prospects:
            pool_class = self.prospect_of(self.queue_of(asked.model)).work_class
        wishes, pause_s = preamble.wishes, self.config.keepalive_comment_secs
        lay(
            request,
            wishes,
            principal,
            pool_class=pool_class,
            arrived_s=arrived_s,
            kept_alive=asked.stream and 0.0 < pause_s < wishes.patience_s,
        )
        if self._model_regions or principal.models is not None or principal.regions is not None:
            self._restrict(asked, principal, lookup=route.lookup)
        levels = route.json and bool(principal.tenant) and names_priority(body, asked.scanned)
        if (salt and route.json) or levels or asked.service_tier is not None:
            asked.added = fields_for(
                route.name, salt, asked.cache_salt, asked.service_tier, levels=levels
            )
            if asked.service_tier is not None and route.prompt in _TOLD:
                asked.tier = tier_used(asked_class, request.work_class)
        return asked

    def _restrict(self, asked: Asked, principal: Principal, *, lookup: bool) -> None:
        """Refuse a model that its sender may not ask for; else note where it may be computed."""
        model = asked.model or self.only_model()
        if not lookup and not may_ask(principal, model, asked.request.adapter):
            if not principal.rated:  # a line of a job would wait for such a model in vain
                raise InvalidRequestError("the tenant of this job may not ask for its model")
            raise self.unknown_model(model, principal)
        asked.request.regions = regions_of(principal, model, self._model_regions)

    def salt_of(self, principal: Principal, preamble: Preamble) -> str:
        """Return what sets its cached prefixes apart from those of others; empty: nothing does."""
        if principal.salt or not self.config.tenant_isolation:
            return principal.salt
        return salt_of_key(preamble.key_digest)


def _regions_of_models(config: ProxyConfig) -> dict[str, frozenset[str]]:
    models = config.access.models.items()
    return {model: frozenset(access.regions) for model, access in models if access.regions}
