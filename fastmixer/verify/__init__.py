"""``python -m fastmixer verify``: a whole model compared, block by block, with the truth and with eager."""
