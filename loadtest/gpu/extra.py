"""Step: another command against the running engine: one start serves several measurements."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys

from loadtest.gpu.scene import Scene
from loadtest.gpu.steps import Findings
from loadtest.run import RunError

LINES_SHOWN = 60


async def run_command(command: str, scene: Scene, found: Findings) -> None:
    """Run it, its output as the table; `python` is ours. Raises `RunError` when it cannot start."""
    filled = command.format(
        engine=scene.stack.engine_url, proxy=scene.stack.proxy_url, model=scene.model
    )
    words = shlex.split(filled)
    if words[0] in ("python", "python3"):
        words[0] = sys.executable
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise RunError(f"{words[0]}: cannot be started: {error.strerror}") from error
    try:
        output, _ = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    lines = output.decode("utf-8", "replace").splitlines()
    found.table = "\n".join(lines[-LINES_SHOWN:])
    found.figures["status"] = process.returncode
    found.claim(process.returncode == 0, f"it ended with 0, not with {process.returncode}")
