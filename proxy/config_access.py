"""The part of the configuration that says who may ask for what, and how much of it.

A *tenant* is whoever is counted and limited as one: a team, a product, a customer. It comes with
API keys (`proxy.keys_path`), or with tokens of an identity provider (`jwt`); what its keys may do
in all is said here, and a key can only be allowed less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from proxy.config_models import ModelConfig, WorkClass
from proxy.config_reading import Count, Name, Path, Seconds, Section

# Counted in billionths, all of it still fits into 64 bits.
Money = Annotated[float, Meta(ge=0, le=1e9)]
WEIGHT_MIN = 0.01  # shares are divided by it
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]


class TenantConfig(Section, frozen=True, kw_only=True, rename={"work_class": "class"}):
    """One tenant. A limit of 0 is none."""

    name: Annotated[Name, Meta(description="what keys, records and metrics call it")]
    weight: Annotated[
        float,
        Meta(
            ge=WEIGHT_MIN, le=1000.0, description="share of what is scarce, against other tenants"
        ),
    ] = 1.0
    work_class: Annotated[
        WorkClass | None,
        Meta(description="class of its requests that say none (default: the model's pool's)"),
    ] = None
    classes: Annotated[
        tuple[WorkClass, ...],
        Meta(description="classes it may ask for; others become the next lower (default: all)"),
    ] = ()
    models: Annotated[
        tuple[Name, ...], Meta(description="models that it may ask for (default: all)")
    ] = ()
    regions: Annotated[
        tuple[Name, ...],
        Meta(description="regions in which its requests may be computed (default: all)"),
    ] = ()
    requests_per_min: Annotated[Count, Meta(description="in any minute, over all its keys")] = 0
    tokens_per_min: Annotated[
        Count, Meta(description="prompt and completion tokens in any minute, over all its keys")
    ] = 0
    max_concurrent: Annotated[Count, Meta(description="requests at a time; more are 429")] = 0
    tokens_per_day: Annotated[Count, Meta(description="from midnight to midnight, UTC")] = 0
    budget_per_day: Annotated[
        Money | None,
        Meta(description="in the currency of the models' prices, from midnight to midnight, UTC"),
    ] = None
    cache_isolation: Annotated[
        bool,
        Meta(description="no cached prefix is shared with other tenants, in proxies and engines"),
    ] = False
    slo_ttft_ms: Annotated[
        Count, Meta(description="time to first token that its online requests want; 0: none said")
    ] = 0

    def __post_init__(self) -> None:
        """Refuse a class that it may not have."""
        if self.work_class is not None and self.classes and self.work_class not in self.classes:
            raise ValueError(
                f"class {self.work_class} is not among its classes {', '.join(self.classes)}"
            )


class JwtConfig(Section, frozen=True, kw_only=True):
    """Tokens of an identity provider, in place of keys (RFC 7519; OpenID Connect Discovery 1.0)."""

    issuer: Annotated[str, Meta(min_length=1, description="whose tokens are taken (claim iss)")]
    audience: Annotated[str, Meta(min_length=1, description="whom they are for (claim aud)")]
    jwks_url: Annotated[
        str | None,
        Meta(description="its public keys (default: as its openid-configuration says)"),
    ] = None
    jwks_path: Annotated[
        Path | None, Meta(description="file of its public keys, in place of a URL")
    ] = None
    algorithms: Annotated[
        tuple[Algorithm, ...], Meta(min_length=1, description="signatures that are taken")
    ] = ("RS256", "ES256")
    tenant_claim: Annotated[
        str, Meta(min_length=1, description="claim that names the tenant, dots go into objects")
    ] = "sub"
    unknown_tenants: Annotated[
        Literal["refuse", "default"],
        Meta(description="a tenant that is not configured: refuse, or policy of tenant `default`"),
    ] = "refuse"
    leeway_secs: Annotated[Seconds, Meta(description="by which clocks may differ")] = 30.0

    def __post_init__(self) -> None:
        """Refuse keys of two sources, and such as anybody on the way could put his own among."""
        if self.jwks_url is not None and self.jwks_path is not None:
            raise ValueError("jwks_url and jwks_path exclude each other: one names the keys")
        if self.jwks_path is None and not _is_safe(self.jwks_url or self.issuer):
            what = "the issuer" if self.jwks_url is None else "jwks_url"
            raise ValueError(
                f"{what} must be an https URL, or http on this machine: whoever can change its "
                "answer on the way could sign tokens; or put the keys into a file (jwks_path)"
            )


def _is_safe(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme == "https":
        return bool(parts.hostname)
    return parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")


class ClassesConfig(Section, frozen=True, kw_only=True):
    """How the classes share what is scarce."""

    online_reserve: Annotated[
        float,
        Meta(
            ge=0.0,
            lt=1.0,
            description="part of each replica's max_inputs that only online requests take",
        ),
    ] = 0.0
    late: Annotated[
        Literal["serve", "shed"],
        Meta(
            description="a request that can no longer meet its deadline: serve it after those that "
            "can, or answer it 504 at once"
        ),
    ] = "serve"


class RemoteRegionConfig(Section, frozen=True, kw_only=True):
    """A proxy of another region: where requests go that this region cannot take as soon."""

    region: Annotated[Name, Meta(description="its region; several proxies of it may be listed")]
    url: Annotated[
        str, Meta(min_length=1, description="its listener for clients, such as https://us.example")
    ]
    peer: Annotated[
        Path, Meta(description="HOST:PORT or unix:PATH where it listens for peers (peer_listen)")
    ]


class ModelAccess(Section, frozen=True, kw_only=True):
    """What the proxy must know of a configured model: where it may run, and what a token costs."""

    regions: tuple[Name, ...] = ()
    prompt_price: Money = 0.0  # of a million tokens
    cached_price: Money = 0.0
    completion_price: Money = 0.0


class AccessConfig(Section, frozen=True, kw_only=True):
    """All of it together, as a proxy's workers get it."""

    tenants: tuple[TenantConfig, ...] = ()
    jwt: JwtConfig | None = None
    classes: ClassesConfig = ClassesConfig()
    remote_regions: tuple[RemoteRegionConfig, ...] = ()
    models: dict[str, ModelAccess] = msgspec.field(default_factory=dict)


def check_claims(
    region: str,
    tenants: Sequence[TenantConfig],
    remote_regions: Sequence[RemoteRegionConfig],
    models: Sequence[ModelConfig],
) -> None:
    """Refuse tenants, regions and models that contradict each other."""
    names = Counter(tenant.name for tenant in tenants)
    for name, count in names.most_common(1):
        if count > 1:
            raise ValueError(f"tenant '{name}' is defined twice")
    for remote in remote_regions:
        if remote.region == region:
            raise ValueError(
                f"remote_regions: {remote.url} is said to be in this region, {region}; "
                "proxies of one region are in proxy.peers"
            )
    for model in models:
        if model.regions and region not in model.regions and model.pools:
            raise ValueError(
                f"model '{model.name}' may not run in this region, {region}: add it to "
                "the model's regions, or remove the model"
            )
