"""A folder for an engine's PYTHONPATH; nothing of it is imported here."""
