"""Load tests: a stranger on the wire."""
