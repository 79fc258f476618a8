"""`doherty check` beyond the file: would the engines of this machine take what the pools give them?

A misspelt flag, or one of another release, would else be found by a start that fails. What cannot
be told here (an engine that is not installed on this machine, a release that nobody read) is a
warning, because the file may be meant for another machine.
"""

from __future__ import annotations

from collections.abc import Mapping

from backends.engines import ENGINES
from backends.engines.base import Engine, EngineMissingError, FlagError
from backends.engines.flags import check_flags, flag_table
from backends.engines.probe import probe_release, program_of
from backends.engines.release import UNKNOWN_RELEASE
from backends.spec import ReplicaSpec, replica_specs
from proxy.config import Config, ConfigError


def check_engines(
    config: Config,
    source: str,
    environ: Mapping[str, str],
    engines: Mapping[str, Engine] = ENGINES,
) -> tuple[str, ...]:
    """Return what to warn of. Raises `ConfigError` for arguments that an engine would not take."""
    warnings: list[str] = []
    firsts = {(spec.model, spec.pool): spec for spec in reversed(replica_specs(config))}
    for spec in reversed(firsts.values()):
        try:
            said = _check(engines[spec.engine], spec, environ)
        except FlagError as error:
            raise ConfigError(f"{source}: model '{spec.model}': {error}") from error
        warnings += [f"model '{spec.model}': {warning}" for warning in said]
    return tuple(dict.fromkeys(warnings))


def _check(engine: Engine, spec: ReplicaSpec, environ: Mapping[str, str]) -> tuple[str, ...]:
    try:
        release = probe_release(program_of(engine, spec, environ))
    except EngineMissingError as error:
        engine.check(spec, UNKNOWN_RELEASE)
        return (str(error), *check_flags(flag_table(engine.name), spec.args, UNKNOWN_RELEASE))
    return engine.check(spec, release)
