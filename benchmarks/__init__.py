"""Timings on a GPU; run from the repository's root, for example ``python -m benchmarks.blocks``."""
