"""Ahead-of-time compilation: what a launch needs of a GPU, read from its compiled code, with no GPU at hand."""
