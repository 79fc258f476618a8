"""Doherty's control plane: starts engine replicas, watches them, and publishes the fleet."""
