"""The command line and environment of `doherty proxy`, made from the configuration's own fields."""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import msgspec

from proxy.config import (
    ENVIRONMENT_PREFIX,
    Config,
    ConfigError,
    ProxyConfig,
    describe_fields,
    load_config,
    override,
)
from proxy.dialect import remark
from proxy.flag_groups import FURTHER, GROUPS, group_of
from proxy.help_form import Words, dress, refuse
from proxy.secret_files import is_secret, variable


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of `ProxyConfig`; unset flags leave no trace in the namespace."""
    defaults = ProxyConfig()
    names = [*GROUPS, FURTHER]
    groups = {name: parser.add_argument_group(name) for name in names}
    for name, kind, words in describe_fields(ProxyConfig):
        flag = "--" + name.replace("_", "-")
        default = getattr(defaults, name)
        shown = "" if default in (None, (), "") else f" (default: {_shown(default)})"
        shown += f" [{ENVIRONMENT_PREFIX}{name.upper()}]"
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": words + shown,
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            metavar = "URL" if name.endswith("urls") else "ADDRESS"
            options |= {"nargs": "*", "metavar": metavar}
        elif get_origin(kind) is Literal:
            options["metavar"] = f"{{{','.join(get_args(kind))}}}"
        else:
            options["metavar"] = name.rsplit("_", 1)[-1].upper()
        options["help"] = options["help"].replace("%", "%%")
        groups[group_of(name)].add_argument(flag, **options)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)


EXAMPLES = Words(
    (
        "doherty proxy --worker-urls http://gpu1:30000 http://gpu2:8000",
        "doherty proxy --manager-url http://127.0.0.1:8002 --workers 4 --host 0.0.0.0",
        "doherty proxy --config doherty.yaml --access-log off",
        "DOHERTY_API_KEY=secret doherty proxy --config doherty.yaml --port 9000",
    ),
    "Settings come from a flag, else from the environment variable beside it,\n"
    "else from the proxy section of the file, else they are the default. Keys may\n"
    f"stand in files: {ENVIRONMENT_PREFIX}ADMIN_API_KEY_FILE names one.\n"
    "SIGHUP reads the file again, SIGTERM drains, SIGUSR2 takes over by a new one.",
)


def add_all(parser: argparse.ArgumentParser) -> None:
    """Add all that `doherty proxy` takes, and say what it is for."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"YAML file; its proxy section is read [{ENVIRONMENT_PREFIX}CONFIG]",
    )
    parser.add_argument(
        "--takeover",
        nargs="?",
        const="",
        metavar="SOCKET",
        help="take the place of the proxy that runs with this --upgrade-socket, losing no request; "
        "alone: of the one at our own --upgrade-socket, if any is there",
    )
    add_flags(parser)
    parser.description = "Serve one OpenAI-compatible endpoint in front of engine replicas."
    dress(parser, EXAMPLES)


class Invocation(msgspec.Struct, frozen=True):
    """How the command was called. Its settings can be read again: the file may have changed."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    path: str | None
    takeover: str | None  # the socket; empty: our own --upgrade-socket, where one is there
    given: dict[str, Any]

    def settings(self) -> ProxyConfig:
        """Return the effective settings: flag, then environment, then file, then default.

        Raises `proxy.config.ConfigError`.
        """
        config = load_config(self.path) if self.path else Config()
        from_file = config.proxy
        if from_file.region == ProxyConfig().region:
            from_file = msgspec.structs.replace(from_file, region=config.region)
        from_file = msgspec.structs.replace(from_file, access=config.access)
        from_environment = override(
            from_file, environment_values(self.environment), ENVIRONMENT_PREFIX + "{env}"
        )
        return override(from_environment, self.given, "--{flag}")


def read(argv: Sequence[str], environment: Mapping[str, str]) -> ProxyConfig:
    """Return the effective settings. Raises `proxy.config.ConfigError`."""
    return parse(argv, environment).settings()


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Invocation:
    """Read the command line itself. Raises `ConfigError` for what other routers have."""
    parser = argparse.ArgumentParser(prog="doherty proxy")
    add_all(parser)
    known, unknown = parser.parse_known_args(list(argv))
    ours = {"--" + name.replace("_", "-") for name, _, _ in describe_fields(ProxyConfig)}
    if foreign := _foreign(unknown, ours):
        raise ConfigError(foreign)
    refuse(parser, argv, unknown)
    given = vars(known)
    path = given.pop("config") or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    takeover = given.pop("takeover")
    return Invocation(tuple(argv), environment, path or None, takeover, given)


def _foreign(unknown: Sequence[str], ours: Container[str]) -> str:
    """Return what to say of flags that other routers have, of all at once; empty if there is none.

    Whoever moves a command line over mends it in one go, not by one start for each flag.
    """
    by_words: dict[str, list[str]] = {}
    for flag in unknown:
        if words := remark(flag, ours):
            by_words.setdefault(words, []).append(flag.partition("=")[0])
    return "; ".join(
        f"{', '.join(flags)} {'is' if len(flags) == 1 else 'are'} another router's: {words}"
        for words, flags in by_words.items()
    )


def environment_values(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that the environment sets. Raises `ConfigError`."""
    values: dict[str, Any] = {}
    for name, kind, _ in describe_fields(ProxyConfig):
        text = variable(environment, ENVIRONMENT_PREFIX + name.upper(), secret=is_secret(name))
        if text is None:
            continue
        values[name] = text.split() if kind == tuple[str, ...] else text
    return values
