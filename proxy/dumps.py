"""What a process leaves behind when it crashes: no image of its memory.

There, keys and prompts lie as they came. Linux writes such an image as far as a soft limit allows,
and the collectors of systemd and Ubuntu, which get them through a pipe, go by it as well (core(5),
systemd-coredump(8)). The hard limit stays, so that whoever has to see one can raise it for the one
process: `prlimit --pid PID --core=unlimited`.
"""

from __future__ import annotations

import resource


def leave_none() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
