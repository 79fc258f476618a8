"""How a part of Doherty that is optional is installed: one command, for the Python that lacks it.

The command names its interpreter, because whoever reads it may have started Doherty by a path
without activating its environment, and the `pip` of their shell is another Python's then. From a
checkout it names the folder: the index may have no release of that name, or a stranger's.
"""

import shlex
import sys
from pathlib import Path


def install_command(extra: str) -> str:
    """Return the command that installs `extra`, from whatever folder it is called."""
    checkout = Path(__file__).resolve().parents[2]
    is_one = (checkout / "pyproject.toml").is_file()
    what = ("-e", f"{checkout}[{extra}]") if is_one else (f"doherty[{extra}]",)
    return shlex.join((sys.executable, "-m", "pip", "install", *what))
