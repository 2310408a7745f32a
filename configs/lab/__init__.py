"""The experiments of `bn_repro.lab`, and how large they are."""
