"""What tenants use at one worker: their limits are taken from and settled here, and it is counted.

Whose row is whose in the memory of all workers the supervisor says (`io/quota_memory.py`). Without
one, as where a plane runs by itself, the worker counts in memory of its own. What is admitted
before tenants or rows change is settled by the account from which it was taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from proxy import errors
from proxy.config import ProxyConfig
from proxy.core import admission, claim_limits, quota
from proxy.core.admission import FREE, Allowance, Claim, Prices, Refused
from proxy.core.http1 import Field
from proxy.core.principal import Principal
from proxy.core.quota import Account, Rows
from proxy.core.usage import Usage
from proxy.io.access_log import AccessLog
from proxy.io.clock import Clock
from proxy.io.quota_memory import quota_cells_alone
from proxy.io.tasks import beat
from proxy.io.telemetry import Sample

_OTHER: Final = "other"
_MEAN_WEIGHT: Final = 0.05  # of the newest answer in what a tenant's answers have on average


class TenantSeries:
    """What is counted of a tenant and a model."""

    __slots__ = ("cached_tokens", "completion_tokens", "cost", "prompt_tokens", "requests")

    def __init__(self) -> None:
        self.requests = self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.cost = 0  # in billionths


class Holding:
    """One tenant with a limit: what it may have, and its account."""

    __slots__ = ("account", "allowed")

    def __init__(self, account: Account, allowed: Allowance) -> None:
        self.account = account
        self.allowed = allowed


class Metering:
    """All tenants, at one worker."""

    def __init__(self, config: ProxyConfig, clock: Clock) -> None:
        self.log = AccessLog("off")
        self.region = config.region or ""
        self._clock = clock
        self._config = config
        self._cells: memoryview | None = None
        self._place, self._workers = 0, 1
        self._rows: dict[str, int] | None = None  # None: nobody says; they are our own to give
        self._own_rows = Rows()
        self._accounts: dict[int, Account] = {}  # by row; those that have ever been used
        self._limited: dict[str, Holding] = {}
        self._prices: dict[str, Prices] = {}
        self._means: dict[str, float] = {}  # tokens of answers that nothing bounds, by tenant
        self._series: dict[tuple[str, str], TenantSeries] = {}
        self._refused: dict[tuple[str, str], int] = defaultdict(int)
        self._know()

    def connect(self, cells: memoryview, place: int, workers: int, rows: Mapping[str, int]) -> None:
        """Count in this memory, in which `rows` are the tenants'."""
        self._cells, self._place, self._workers = cells, place, workers
        self._accounts = {}
        self.know_rows(rows)

    def know_rows(self, rows: Mapping[str, int]) -> None:
        """These are the rows of those who have limits, from now on."""
        self._rows = dict(rows)
        self._know()

    def follow(self, config: ProxyConfig) -> None:
        """Go on as `config` says."""
        self._config = config
        self.region = config.region or ""
        self._know()

    def change_log(self, log: AccessLog) -> AccessLog:
        """Write to this one from now on; return the one that is left."""
        before, self.log = self.log, log
        log.dropped_total = before.dropped_total
        return before

    def _know(self) -> None:
        allowed = admission.allowances(self._config.access)
        rows = self._rows
        if rows is None:
            rows = self._own_rows.assign(allowed)[0]
        self._limited = {
            name: Holding(self._account(rows[name]), each)
            for name, each in allowed.items()
            if name in rows
        }
        models = self._config.access.models
        self._prices = {name: Prices(access) for name, access in models.items()}
        tenants = {tenant.name for tenant in self._config.access.tenants}
        self._means = {name: mean for name, mean in self._means.items() if name in tenants}

    def _account(self, row: int) -> Account:
        if self._cells is None:
            self._cells = quota_cells_alone()
        account = self._accounts.get(row)
        if account is None:
            account = Account(self._cells, self._workers, row, self._place)
            self._accounts[row] = account
        return account

    async def run(self) -> None:
        """Sweep ten times a second, once while nobody has limits."""
        while True:
            await beat(1.0 / quota.BUCKETS_PER_S if self._accounts else 1.0)
            self.sweep()

    def sweep(self) -> None:
        """Forget what is older than a minute, so that others do not count it any more."""
        bucket = quota.bucket_at(self._clock.now_s())
        for account in self._accounts.values():
            account.advance(bucket)

    # --- one request -------------------------------------------------------------------------

    def prices_of(self, model: str) -> Prices:
        return self._prices.get(model, FREE)

    def mean_of(self, tenant: str) -> int:
        """Return how many tokens an answer is believed to have that nothing bounds."""
        mean = self._means.get(tenant, claim_limits.COMPLETION_PRIOR_TOKENS)
        return min(int(mean), claim_limits.COMPLETION_TOKENS_BELIEVED_MAX)

    def learn(self, tenant: str, completion_tokens: int) -> None:
        """An answer that nothing bounded had so many."""
        mean = self._means.get(tenant, float(claim_limits.COMPLETION_PRIOR_TOKENS))
        self._means[tenant] = mean + _MEAN_WEIGHT * (completion_tokens - mean)

    def holding_of(self, principal: Principal) -> Holding | None:
        return self._limited.get(principal.tenant) if principal.limited else None

    def take(
        self, holding: Holding, claim: Claim, tenant: str
    ) -> tuple[list[Field], errors.ProxyError | None]:
        """Let a request in, or say why not; with what its answer says of limits."""
        now_s = self._clock.now_s()
        account, allowed = holding.account, holding.allowed
        refused = admission.admit(account, allowed, claim, now_s, self._clock.unix_s())
        fields = admission.told(account, allowed, now_s)
        if refused is None:
            return fields, None
        self._refused[tenant, refused.kind] += 1
        return fields, _error_of(refused, tenant)

    def settle(
        self, holding: Holding, claim: Claim, usage: Usage | None, cost: int, *, begun: bool
    ) -> None:
        """A request that was let in is over. Exactly once."""
        now_s, unix_s = self._clock.now_s(), self._clock.unix_s()
        admission.settle(holding.account, claim, usage, cost, now_s, unix_s, begun=begun)

    def count(self, tenant: str, model: str, usage: Usage, cost: int) -> None:
        """Add what one request used to the series of its tenant and model."""
        series = self._series.get((tenant, model))
        if series is None:
            if len(self._series) >= claim_limits.TENANT_SERIES_MAX:
                tenant = model = _OTHER
            series = self._series.setdefault((tenant, model), TenantSeries())
        series.requests += 1
        series.prompt_tokens += usage.prompt_tokens
        series.cached_tokens += usage.cached_tokens or 0
        series.completion_tokens += usage.completion_tokens
        series.cost += cost

    # --- what is reported --------------------------------------------------------------------

    def in_flight(self) -> int:
        """Return what this worker holds of all limits: nothing, once nothing runs."""
        kinds = (quota.CONCURRENT, quota.HELD_TOKENS, quota.HELD_COST)
        return sum([account.own(kind) for account in self._accounts.values() for kind in kinds])

    def counters(self) -> list[Sample]:
        out = [
            Sample("tenant_rate_limited_total", (("tenant", tenant), ("limit", kind)), count)
            for (tenant, kind), count in self._refused.items()
        ]
        for (tenant, model), series in self._series.items():
            by = (("tenant", tenant), ("model", model))
            out += [
                Sample("tenant_requests_total", by, series.requests),
                Sample("tenant_prompt_tokens_total", by, series.prompt_tokens),
                Sample("tenant_cached_tokens_total", by, series.cached_tokens),
                Sample("tenant_completion_tokens_total", by, series.completion_tokens),
                Sample("tenant_cost_total", by, series.cost / admission.NANO),
            ]
        out.append(Sample("usage_log_dropped_total", (), self.log.dropped_total))
        return out


def _error_of(refused: Refused, tenant: str) -> errors.ProxyError:
    message = refused.message(tenant)
    if refused.over:
        return errors.QuotaError(message)
    if refused.wait_s < 0.0:
        return errors.OverRateLimitError(message)
    error = errors.RateLimitError(message, wait_s=max(1, math.ceil(refused.wait_s)))
    error.wait_ms = max(1, math.ceil(refused.wait_s * 1000.0))
    return error
