"""``python -m fastmixer compile``: compile the catalogue for one or more GPUs, none needed, and report.

The work happens in fresh worker processes without ``TRITON_INTERPRET``: the command works wherever it
is called from, also where this process has Triton in interpreter mode already.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from fastmixer.configs import TARGETS

MAX_WORKERS = 8  # a worker holds torch and Triton: about 0.5 GB and some seconds to start


def run(archs: Sequence[str] = (), as_json: bool = False, jobs: int | None = None) -> int:
    """Compiles every catalogue entry for every arch and prints a table each, or JSON.

    Args:
        archs: names in ``configs.TARGETS``; empty means all of them.
        as_json: print ``{"ok": bool, "rows": [...]}`` instead; each row has "arch", "label", "ok",
            "error" (None or text), "seconds" and, if it compiled, all of :meth:`aot.Compiled.as_row`.
        jobs: worker processes; by default one for each CPU, up to MAX_WORKERS.

    Returns:
        The exit code: 1 if an entry does not compile or does not fit its GPU, otherwise 0.

    Raises:
        ValueError: an unknown arch.
        RuntimeError: Triton is missing, or rich is and a table was asked for.
    """
    archs = list(dict.fromkeys(archs)) or list(TARGETS)
    for arch in archs:
        _check_arch(arch)
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("compile needs Triton, which is not installed: pip install triton (Linux only)")

    with _progress_bar(as_json) as advance:
        rows = compile_catalogue(archs, jobs, advance)
    ok = all(row["ok"] for row in rows)
    if as_json:
        print(json.dumps({"ok": ok, "rows": rows}, indent=1))
    else:
        _print_tables(archs, rows)
    return 0 if ok else 1


def _check_arch(arch: str) -> None:
    if arch not in TARGETS:
        near = difflib.get_close_matches(arch, TARGETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"arch: expected one of {', '.join(TARGETS)}, got {arch!r}{hint}")


def compile_catalogue(
    archs: Sequence[str], jobs: int | None = None, advance: Callable[[int, int], None] = lambda done, of: None
) -> list[dict]:
    """One row for every catalogue entry of every arch, in the catalogue's order.

    Entries that come down to the same code are compiled once. ``advance`` is called with the number of
    entries done and known.
    """
    jobs = jobs or min(os.cpu_count() or 1, MAX_WORKERS)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        listings = {arch: pool.submit(_list_entries, arch) for arch in archs}
        places: dict[Future, list[int]] = {}  # the rows that a compilation fills
        rows: list[dict] = []
        for arch, listing in listings.items():
            pending: dict[str, Future] = {}
            for index, (label, key) in enumerate(listing.result()):
                if key not in pending:
                    pending[key] = pool.submit(_compile_entry, arch, index)
                places.setdefault(pending[key], []).append(len(rows))
                rows.append({"arch": arch, "label": label})
        done = 0
        for future in as_completed(places):
            outcome = _outcome(future)
            for place in places[future]:
                rows[place].update(outcome)
            done += len(places[future])
            advance(done, len(rows))
    return rows


def _outcome(future: Future) -> dict:
    try:
        return future.result()
    except BrokenProcessPool as error:  # LLVM aborts the process on some internal errors
        return {"ok": False, "error": f"a compiler process died: {error}", "seconds": 0.0}


# In the worker processes.


def _start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print must not mix with the report


@functools.cache
def _entries(arch: str) -> list:
    from fastmixer.aot.catalogue import catalogue

    return list(catalogue(TARGETS[arch]))


def _list_entries(arch: str) -> list[tuple[str, str]]:
    """Label and key of every entry; entries with the same key compile to the same code."""
    from fastmixer.aot.compile import signature

    listing = []
    for entry in _entries(arch):
        launch = entry.launch
        try:
            identity = (launch.kernel.cache_key, *signature(launch, TARGETS[arch]), launch.options)
        except Exception:  # the compilation will say so, as this entry's result
            identity = len(listing)
        listing.append((entry.label, repr(identity)))
    return listing


def _compile_entry(arch: str, index: int) -> dict:
    import triton

    from fastmixer.aot.compile import compile_launch

    start = time.perf_counter()
    try:
        entry = _entries(arch)[index]
        compiled = compile_launch(entry.launch, TARGETS[arch])
    except Exception as error:  # whatever the compiler says is the result: it becomes the report's
        outcome = {"ok": False, "error": _explain(error), "triton": triton.__version__}
    else:
        outcome = {"ok": compiled.fits, "error": None, "multiplies": entry.multiplies, **compiled.as_row()}
        if not compiled.fits:
            outcome["error"] = (
                f"does not fit: {compiled.shared_memory} bytes of shared memory where a program may use "
                f"{compiled.shared_memory_limit}, {compiled.registers} registers x {compiled.num_warps} warps"
            )
    return {**outcome, "seconds": round(time.perf_counter() - start, 2)}


def _explain(error: BaseException) -> str:
    """The message with those of its causes: Triton reports a call, and why the callee failed as its cause."""
    text = f"{type(error).__name__}: {error}"
    return text if error.__cause__ is None else f"{text}\nbecause of {_explain(error.__cause__)}"


# What the user sees.


@contextlib.contextmanager
def _progress_bar(as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; JSON does without rich."""
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError as error:
        if not as_json:
            raise RuntimeError(
                'the table needs rich: pip install "fastmixer[demo]", or use --json'
            ) from error
        yield lambda done, of: None
        return
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


PRODUCTS = {
    "hgmma": "HGMMA",
    "hmma": "HMMA",
    "imma": "IMMA",
    "dmma": "DMMA",
    "tcgen05": "tcgen05",
    "mfma": "MFMA",
}


def _print_tables(archs: Sequence[str], rows: list[dict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fastmixer.aot.catalogue import exception

    console = Console()
    if not console.is_terminal:
        console.width = 130  # a file has no width: rich would fold everything into 80 columns
    for arch in archs:
        mine = [row for row in rows if row["arch"] == arch]
        version = next((row["triton"] for row in mine if "triton" in row), "?")
        table = Table(title=f"{arch}, Triton {version}", box=box.SIMPLE_HEAD)
        table.add_column("kernel", overflow="fold")
        for column in (
            "regs", "spills", "in loops", "shared KB", "per SM", "products", "wgmma", "per element", "issue"
        ):  # fmt: skip
            table.add_column(column, justify="right")
        table.add_column("")
        for row in mine:
            table.add_row(
                escape(row["label"]), *_cells(row), "[green]ok[/]" if row["ok"] else "[red]fails[/]"
            )
        console.print(table)
        for reason, labels in _grouped((row["error"], row["label"]) for row in mine if not row["ok"]):
            console.print(f"{', '.join(labels)}:\n{reason}\n", style="red", markup=False)
        if arch == "sm_90":
            found = ((exception(row["label"], row), row["label"]) for row in mine if "registers" in row)
            for reason, labels in _grouped(pair for pair in found if pair[0] is not None):
                console.print(f"{', '.join(labels)}:\n{reason or 'no reason known'}\n", markup=False)
    failed = sum(not row["ok"] for row in rows)
    console.print(
        f"{len(rows) - failed} of {len(rows)} compile and fit. per SM: programs that fit at a time. per "
        "element: instructions for each hidden element (token mixing) or, behind the loop, output element. "
        "issue: a scheduler's slots over the tensor cores' cycles."
    )


def _grouped(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, list[str]]]:
    """(reason, label) pairs by reason."""
    labels: dict[str, list[str]] = {}
    for reason, label in pairs:
        labels.setdefault(reason, []).append(label)
    return labels.items()


def _cells(row: dict) -> list[str]:
    if "registers" not in row:
        return ["-"] * 9
    products = ", ".join(f"{row[key]} {name}" for key, name in PRODUCTS.items() if row[key])
    wgmma = ("serialised" if row["serialised"] else "overlap") if row["hgmma"] else "-"
    return [
        str(row["registers"]),
        str(row["spills"]),
        str(row["loop_spills"]),
        f"{row['shared_memory'] / 1024:.1f}",
        str(row["programs_per_multiprocessor"]),
        products or "-",
        wgmma,
        "-" if row["per_element"] is None else f"{row['per_element']:.1f}",
        "-" if row["issue_share"] is None else f"{row['issue_share']:.2f}",
    ]
