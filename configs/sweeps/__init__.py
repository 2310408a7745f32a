"""Sweeps: families of runs to compare, and what varies between them."""
