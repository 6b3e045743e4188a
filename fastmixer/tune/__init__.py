"""``python -m fastmixer tune``: candidates compiled in parallel, checked, timed and recorded."""
