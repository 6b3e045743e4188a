"""Ahead-of-time compilation: what launches need of a GPU, read from their compiled code without a GPU."""
