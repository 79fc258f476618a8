"""A GPU-free, OpenAI-compatible engine with an honest clockwork."""
