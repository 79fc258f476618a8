"""`python -m backends.simulator`."""

from __future__ import annotations

import sys

from backends.simulator.app import main

sys.exit(main())
