"""The host side of the kernels: allocate, choose, launch; forward and backward of a half side by side."""
