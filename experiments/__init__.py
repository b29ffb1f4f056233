"""Experiments behind the numbers in README and notebooks; run from the repository root."""
