"""Checkpoint files: read, named as the model names its parameters, resized, and loaded as a whole or not at all."""
