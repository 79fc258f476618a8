"""`python -m proxy` is `doherty proxy`."""

import sys

from proxy.compile import take_core

take_core()

from proxy.app import main  # noqa: E402  # by which it runs

sys.exit(main())
