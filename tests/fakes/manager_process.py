"""The manager with the tiny engine for every engine: `manager_process.py CONFIG [--detach]`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from typing_extensions import override

from backends.engines.base import Launch, Ports, PortsNeeded
from backends.engines.release import Release
from backends.engines.vllm import Vllm
from backends.failure import StartError
from backends.serve import serve
from backends.spec import ReplicaSpec
from proxy.config import load_config

ENGINE = Path(__file__).with_name("engine_process.py")


class TinyEngine(Vllm):
    """Read like vLLM, started as the tiny engine."""

    name = "simulator"
    uses_gpu = False

    @override
    def command(self, spec: ReplicaSpec, ports: Ports, release: Release) -> Launch:
        port = str(ports.http)
        argv = (sys.executable, str(ENGINE), "--port", port, "--model", spec.model, *spec.args)
        return Launch(argv)

    @override
    def check(self, spec: ReplicaSpec, release: Release) -> tuple[str, ...]:
        return ()  # it has flags of its own

    @override
    def ports_needed(self, spec: ReplicaSpec, release: Release) -> PortsNeeded:
        return PortsNeeded()


def main() -> int:
    path = sys.argv[1]
    try:
        return asyncio.run(
            serve(
                load_config(path),
                path,
                detach_on_exit="--detach" in sys.argv[2:],
                engines={"simulator": TinyEngine()},
            )
        )
    except StartError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
