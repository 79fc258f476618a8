"""How a pool should have grown: scaling laws in virtual time, under the same bursts."""
