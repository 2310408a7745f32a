"""A JAX/Flax reproduction of Batch Normalization (Ioffe & Szegedy, 2015)."""
