"""`python -m proxy` is `doherty proxy`."""

import sys

from proxy.app import main

sys.exit(main())
