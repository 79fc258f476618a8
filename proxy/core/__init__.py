"""Functions over values: no sockets, no clock, no randomness, no tasks."""
