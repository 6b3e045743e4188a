"""Checkpoint files: read, renamed to the model's names, resized, and loaded as a whole or not at all."""
