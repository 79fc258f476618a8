"""What a request asks for once its body is whole, and what it may have of that.

Reading the body is `core.asked`'s, what its sender may claim `core.claims`'; here is what both need
to know of this proxy.
"""

from __future__ import annotations

from typing_extensions import override

from proxy.config import ProxyConfig
from proxy.core.additions import fields_for, salt_of_key
from proxy.core.asked import Asked, read_body
from proxy.core.claims import lay, may_ask, regions_of
from proxy.core.classes import UNSAID
from proxy.core.preamble import Preamble
from proxy.core.principal import ANYBODY, Principal
from proxy.core.routes import Route
from proxy.io.clock import Clock
from proxy.io.refusal import Refusal


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
        salt = self._salt(principal, preamble)
        asked = read_body(
            route,
            preamble,
            body,
            strict=self.strict,
            tenant=salt.encode(),
            adapters=self.fleet.adapters,
        )
        request, model = asked.request, asked.model
        pool_class = UNSAID
        if request.work_class == UNSAID:
            pool_class = self.prospect_of(self.queue_of(model)).work_class
        lay(request, preamble.wishes, principal, pool_class=pool_class, arrived_s=arrived_s)
        if principal.models is not None and not route.lookup:
            wanted = model or self.only_model()
            if not may_ask(principal, wanted, request.adapter):
                raise self.unknown_model(wanted, principal)
        if self._model_regions or principal.regions is not None:
            request.regions = regions_of(principal, model or self.only_model(), self._model_regions)
        return asked

    def added(self, asked: Asked, route: Route, preamble: Preamble, principal: Principal) -> bytes:
        """Return what has to be added to the body that was read; nothing, as a rule."""
        salt = self._salt(principal, preamble) if route.json else ""
        if not salt and asked.service_tier is None:
            return b""
        return fields_for(route.name, salt, asked.cache_salt, asked.service_tier)

    def _salt(self, principal: Principal, preamble: Preamble) -> str:
        """Return what sets its cached prefixes apart from those of others; empty: nothing does."""
        if principal.salt or not self.config.tenant_isolation:
            return principal.salt
        return salt_of_key(preamble.key_digest)


def _regions_of_models(config: ProxyConfig) -> dict[str, frozenset[str]]:
    models = config.access.models.items()
    return {model: frozenset(access.regions) for model, access in models if access.regions}
