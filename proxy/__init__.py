"""Doherty's data plane: one OpenAI-compatible endpoint in front of many replicas."""
