"""Sweeps: what varies between runs, and what is compared."""
