"""The rungs of the ladder below sleep: suspended processes and images on disk."""
