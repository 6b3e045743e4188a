"""``python -m fastmixer``: see :mod:`fastmixer.cli`."""

from __future__ import annotations

import sys

from fastmixer.cli import main

# The guard matters: ``compile`` starts worker processes, which import this module again.
if __name__ == "__main__":
    sys.exit(main())
