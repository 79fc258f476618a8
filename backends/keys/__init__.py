"""API keys from the operator's side: made, kept in a file, listed, ended, and told to proxies."""
