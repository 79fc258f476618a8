"""`doherty check` beyond the file: would the engines of this machine take what the pools give them?

A misspelt flag, or one of another release, would else be found by a start that fails. What cannot
be told here (an engine that is not installed on this machine, a release that nobody read) is a
warning, because the file may be meant for another machine. The flags for an engine that is not
here are judged by the newest release that is known. Pools that need more cards than are named are
a warning, too: what else there is serves, and the rest waits.
"""

from __future__ import annotations

from collections.abc import Mapping

from backends.engines import ENGINES
from backends.engines.base import Engine, EngineMissingError, FlagError
from backends.engines.features import SGLANG_RANGE, VLLM_RANGE
from backends.engines.probe import probe_release, program_of
from backends.engines.release import UNKNOWN_RELEASE, parse_release
from backends.gpus import pinned
from backends.nvidia_smi import AUTO, NONE, names_of
from backends.providers.container_form import tag_of
from backends.spec import ReplicaSpec, pool_specs
from backends.starting import gpus_wanted
from proxy.config import Config, ConfigError

_NEWEST = {"sglang": SGLANG_RANGE.newest, "vllm": VLLM_RANGE.newest}
_NEWEST["vllm-jobs"] = _NEWEST["vllm"]


def check_engines(
    config: Config,
    source: str,
    environ: Mapping[str, str],
    engines: Mapping[str, Engine] = ENGINES,
) -> tuple[str, ...]:
    """Return what to warn of. Raises `ConfigError` for arguments that an engine would not take."""
    warnings: list[str] = []
    for spec in (pool.first for pool in pool_specs(config) if pool.autoscale or pool.replicas):
        try:
            said = _check(engines[spec.engine], spec, environ)
        except FlagError as error:
            raise ConfigError(f"{source}: model '{spec.model}': {error}") from error
        warnings += [f"model '{spec.model}': {warning}" for warning in said]
    return tuple(dict.fromkeys(warnings))


def none_can_start(
    config: Config, environ: Mapping[str, str], engines: Mapping[str, Engine] = ENGINES
) -> str | None:
    """Return why no pool that takes requests could ever start here; None: one could, or none is.

    A start is tried again with growing pauses, because most of what fails it goes by. A program
    that is not installed does not: where some pool serves, the others wait for it, and who waits
    for an endpoint that needs one of these would wait for ever.
    """
    missing: list[str] = []
    for spec in (pool.first for pool in pool_specs(config) if pool.autoscale or pool.replicas):
        if spec.serves != "requests":
            continue
        if spec.image or spec.elsewhere:
            return None
        try:
            program_of(engines[spec.engine], spec, environ)
        except EngineMissingError as error:
            missing.append(f"model '{spec.model}': {error}")
        except FlagError:  # whoever starts it says which one
            return None
        else:
            return None
    return "\n".join(dict.fromkeys(missing)) or None


def _check(engine: Engine, spec: ReplicaSpec, environ: Mapping[str, str]) -> tuple[str, ...]:
    if spec.image:  # which program is in there, its tag says
        return engine.check(spec, parse_release(tag_of(spec.image)))
    if spec.elsewhere:
        return _check_elsewhere(engine, spec)
    try:
        release = probe_release(program_of(engine, spec, environ))
    except EngineMissingError as error:
        engine.check(spec, UNKNOWN_RELEASE)  # no release would take what this refuses
        newest = _NEWEST.get(engine.name, UNKNOWN_RELEASE)
        try:
            return (str(error), *engine.check(spec, newest))
        except FlagError as problem:
            return (str(error), f"by the newest release that is known: {problem}")
    return engine.check(spec, release)


def _check_elsewhere(engine: Engine, spec: ReplicaSpec) -> tuple[str, ...]:
    """Judge the arguments by what is said of the nodes, which cannot be asked."""
    warnings = engine.check(spec, parse_release(spec.release))
    kind = engine.name.removesuffix("-jobs")
    if not spec.release and kind != "simulator":
        warnings += (
            f"which release of {kind} the nodes have is not known, so its flags are not judged; "
            f"say it in manager.ray.versions.{kind}",
        )
    return warnings


def check_cards(
    config: Config, cards: str, engines: Mapping[str, Engine] = ENGINES
) -> tuple[str, ...]:
    """Return warnings about replicas that need more GPUs than `cards`, the manager's, names."""
    if cards in (AUTO, NONE) or config.manager.provider == "ray":
        return ()
    named = len(names_of(cards))
    needed: dict[str, int] = {}
    for pool in pool_specs(config):
        spec = pool.first
        count = gpus_wanted(engines[spec.engine], spec)
        if count and pinned(spec.env, spec.args, count) is None:
            # Of a scaled pool at least one must find room, or demand would wait for ever.
            least = max(1, pool.autoscale.min) if pool.autoscale else pool.replicas or 0
            needed |= {pool.replica(number).replica_id: count for number in range(least)}
    if sum(needed.values()) <= named:
        return ()
    large = {name: count for name, count in needed.items() if count > named}
    if large:
        who = ", ".join(f"{name} ({count})" for name, count in large.items())
        return (f"more GPUs than the {named} of manager.gpus ({cards}) are needed by {who}",)
    return (
        f"the replicas need {sum(needed.values())} GPUs together, and manager.gpus ({cards}) names "
        f"{named}: some will wait",
    )
