"""``python without_finalizing.py SCRIPT ARGUMENTS`` runs a script and ends its process at once, as it exits.

PyTorch's caches keep the process group of an FSDP2 model beyond ``destroy_process_group``, and with it the
threads of gloo. If one of them drops a tensor of Python's while Python finalizes, the process ends with
SIGABRT ("terminate called without an active exception"), whatever it has computed. Here Python never does.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn


def end(code: int) -> NoReturn:
    """Ends the process with this exit code; what is printed is not lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):  # an error message
            raise
        end(stop.code or 0)
    end(0)
