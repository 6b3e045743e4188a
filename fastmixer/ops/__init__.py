"""The host side of each op: allocate, choose, launch; the forward and the backward of an op side by side."""
