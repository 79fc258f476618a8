"""The shell: moves bytes, waits, and decides nothing."""
