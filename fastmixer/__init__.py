"""fastmixer: MLP-Mixer blocks fused into few GPU passes, numerically at least as good as PyTorch's.

    import fastmixer
    fastmixer.fuse(model)      # replaces the Mixer blocks of a model in place; same checkpoint

Importing it is cheap: triton is imported when a kernel is first needed, and nothing touches a GPU before.
"""

from __future__ import annotations

import importlib
import os.path

__version__ = "0.1.0"

# setup.py maps kernels/ and benchmarks/, which lie beside this folder, into the package. In a checkout that
# was not installed nothing does: there they are found where they lie.
_checkout = os.path.dirname(__path__[0])
if os.path.isfile(os.path.join(_checkout, "kernels", "token_mixing.py")):
    __path__.append(_checkout)

_PUBLIC = {
    "FallbackWarning": "notices",
    "MixingParams": "params",
    "MixerBlock": "blocks.block",
    "MlpMixer": "blocks.model",
    "ThawWarning": "notices",
    "backend": "dispatch",
    "create_model": "blocks.model",
    "current_backend": "dispatch",
    "current_memory": "dispatch",
    "explain": "explain_choices",
    "freeze": "blocks.freezing",
    "fuse": "blocks.surgery",
    "load_checkpoint": "checkpoint.load",
    "load_npz": "checkpoint.load",
    "memory": "dispatch",
    "stale": "blocks.freezing",
    "unfreeze": "blocks.freezing",
    "unfuse": "blocks.surgery",
}

__all__ = [*_PUBLIC, "functional", "reference"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in ("functional", "reference"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
