"""Blocks and models: what ``fuse`` recognises, tries out and replaces, and the modules to build from."""
