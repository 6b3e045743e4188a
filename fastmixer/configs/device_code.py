"""Which device code is installed, and with which Triton: what a measurement holds for."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import re
import tokenize
from collections.abc import Mapping
from pathlib import Path

from fastmixer.versions import package_version


@functools.cache
def kernels_hash(module: str | None = None) -> str:
    """Identifies the device code, or one module of it with all that it imports of the others.

    Comments, docstrings and layout do not count; triton is not imported.
    """
    paths = _kernels_folder().glob("*.py") if module is None else _with_imports(module)
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}\n{_code(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def kernel_hash(kernel: str) -> str:
    """Identifies the device code of ``_<kernel>_kernel``: of the module that defines it."""
    return kernels_hash(_modules()[kernel])


@functools.cache
def _modules() -> Mapping[str, str]:
    """The module that defines each kernel."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in _kernels_folder().glob("*.py")}
    defined = re.compile(r"^def _(\w+)_kernel\(", re.MULTILINE)
    return {kernel: module for module, source in sources.items() for kernel in defined.findall(source)}


def _with_imports(module: str) -> set[Path]:
    paths, waiting = set(), [module]
    while waiting:
        path = _kernels_folder() / f"{waiting.pop()}.py"
        if path not in paths:
            paths.add(path)
            waiting += re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
    return paths


def _kernels_folder() -> Path:
    """Of the installed package, or of the clone that this file lies in."""
    spec = importlib.util.find_spec("fastmixer.kernels")
    places = [*(spec.submodule_search_locations or ())] if spec else []
    return Path(places[0]) if places else Path(__file__).resolve().parents[2] / "kernels"


@functools.cache
def _code(source: str) -> str:
    """The words of a Python source, one space between two; remembered, for modules share what they import."""
    words, begins = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if begins and token.type in (tokenize.STRING, tokenize.NEWLINE):  # a docstring, and its end
            continue
        layout = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        words.append(tokenize.tok_name[token.type] if layout else token.string)
        begins = layout
    return " ".join(words)


@functools.cache
def triton_version() -> str:
    """Of the installed Triton."""
    return package_version("triton")
