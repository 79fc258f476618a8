"""What the manager knows about each engine: launch, readiness, shutdown, metrics."""
