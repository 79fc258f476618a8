"""What a manager tells of its scaling: to people, to tools, and to whoever else would scale.

Bounded: a pool keeps its last `NOTES_MAX` changes of mind.
"""

from __future__ import annotations

import msgspec

from backends.observation import Decision, Observation
from proxy.contract.demand import ModelDemand

SCALING_PATH = "/v1/scaling"
POOLS_PATH = "/v1/pools/{pool_id}/scale"
NOTES_MAX = 50


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """One change of mind, and what was done of it."""

    at_s: float  # Unix time
    pool: str
    was: int
    desired: int
    panicking: bool
    reason: str
    terms: dict[str, float]
    moves: tuple[str, ...] = ()  # for people

    @property
    def direction(self) -> str:
        if self.desired == self.was:
            return "same"
        return "up" if self.desired > self.was else "down"


class PoolReport(msgspec.Struct, frozen=True, kw_only=True):
    """A pool as it is and as it should be."""

    pool: str
    model: str
    work_class: str
    serves: str = "requests"  # or jobs: engine workers, scaled by what is left of these
    presses: bool = False  # its jobs are due so soon that they have moved up a class
    scaled: bool  # by demand; otherwise it is of a fixed size
    min: int
    max: int
    target_inputs: int  # requests in flight per replica to aim at; 0: nobody has said
    desired: int
    ready: int
    coming: int
    going: int
    held: int  # drained by an operator
    resting: dict[str, str]  # replicas at rest, with the rung of each
    waiting: str = ""  # why one that is wanted does not come
    observation: Observation
    decision: Decision | None = None  # None: nobody decides
    notes: tuple[Note, ...] = ()  # the newest last


class GpuReport(msgspec.Struct, frozen=True):
    """The GPUs that are leased; all 0 where none are managed."""

    total: int = 0
    free: int = 0
    holders: dict[str, tuple[str, ...]] = {}


class ScalingReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it."""

    at_s: float  # Unix time
    proxies: int  # that report their demand
    pools: tuple[PoolReport, ...]
    gpus: GpuReport = GpuReport()


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one model is asked for at this moment, by the proxies' newest reports."""

    demand: ModelDemand
    panicking: bool = False  # its pool scales by a burst
    kv_target: float = 1.0  # share of the KV cache above which its pool grows


class DemandReport(msgspec.Struct, frozen=True, kw_only=True):
    """All models, by the names that pools serve: for those who use what is spare."""

    proxies: int  # that report
    models: dict[str, ModelReport]


def encode_report(report: ScalingReport | DemandReport) -> bytes:
    return msgspec.json.encode(report)


def decode_report(body: bytes) -> ScalingReport:
    """Return the report in `body`; raises `msgspec.MsgspecError` when it is not one."""
    return msgspec.json.decode(body, type=ScalingReport)
