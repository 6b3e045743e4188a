"""``python -m fastmixer compile``: compile the catalogue for one or more GPUs, none needed, and report.

The work happens in fresh worker processes without ``TRITON_INTERPRET``: the command works wherever it
is called from, also where this process has Triton in interpreter mode already.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool

from fastmixer.aot.catalogue import catalogue, exception
from fastmixer.aot.workers import worker_pool
from fastmixer.configs import TARGETS
from fastmixer.usage import did_you_mean, progress_bar, table, wide_console

PRODUCTS = ("HGMMA", "HMMA", "IMMA", "DMMA", "tcgen05", "MFMA")  # in rows by their names in lower case
COLUMNS = (
    "regs", "spills", "in loops", "shared KB", "per SM", "products", "wgmma", "waits", "per element", "issue"
)  # fmt: skip


def run(archs: Sequence[str] = (), as_json: bool = False, jobs: int | None = None) -> int:
    """Compiles every catalogue entry for every arch and prints one table per arch, or JSON.

    Args:
        archs: names in ``configs.TARGETS``; empty means all of them.
        as_json: print ``{"ok": bool, "rows": [...]}`` instead; each row has "arch", "label", "ok",
            "error" (None or text), "seconds" and, if it compiled, all of :func:`aot.compile.compile_launch`.
        jobs: worker processes; by default one for each CPU, up to ``workers.MAX_WORKERS``.

    Returns:
        The exit code: 1 if an entry does not compile or does not fit its GPU, otherwise 0.

    Raises:
        ValueError: an unknown arch.
        RuntimeError: Triton is missing, or rich is and a table was asked for.
    """
    archs = list(dict.fromkeys(archs)) or list(TARGETS)
    for arch in archs:
        if arch not in TARGETS:
            raise ValueError(f"arch: unknown arch {arch!r}; {did_you_mean(arch, TARGETS)}")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("compile needs Triton, which is not installed: pip install triton (Linux only)")
    if not as_json and importlib.util.find_spec("rich") is None:
        raise RuntimeError('the table needs rich: pip install "fastmixer[demo]", or use --json')
    rows = compile_catalogue(archs, jobs)
    ok = all(row["ok"] for row in rows)
    if as_json:
        print(json.dumps({"ok": ok, "rows": rows}, indent=1))
    else:
        _print_tables(archs, rows)
    return 0 if ok else 1


def compile_catalogue(archs: Sequence[str], jobs: int | None) -> list[dict]:
    """One row for every catalogue entry of every arch, in the catalogue's order.

    Entries that come down to the same code are compiled once.
    """
    compilations: dict[tuple[str, str], Future] = {}
    entries: list[tuple[dict, Future]] = []
    with progress_bar("compiling") as bar, worker_pool(jobs) as pool:
        listings = {arch: pool.submit(_list_entries, arch) for arch in archs}
        for arch, listing in listings.items():
            for index, (label, key) in enumerate(listing.result()):
                if (arch, key) not in compilations:
                    compilations[arch, key] = pool.submit(_compile_entry, arch, index)
                entries.append(({"arch": arch, "label": label}, compilations[arch, key]))
        for done, _ in enumerate(as_completed(compilations.values()), start=1):
            if bar:
                bar(completed=done, total=len(compilations))
    return [row | _outcome(future) for row, future in entries]


def _outcome(future: Future) -> dict:
    try:
        return future.result()
    except BrokenProcessPool as error:  # LLVM aborts the process on some internal errors
        return {"ok": False, "error": f"a compiler process died: {error}", "seconds": 0.0}


# ---- In the worker processes.


@functools.cache
def _entries(arch: str) -> list:
    return list(catalogue(TARGETS[arch]))


def _list_entries(arch: str) -> list[tuple[str, str]]:
    """The label of every entry, and a key that is the same for those with the same code."""
    from fastmixer.aot.compile import code_key

    listing = []
    for index, (label, launch) in enumerate(_entries(arch)):
        try:
            listing.append((label, code_key(launch, TARGETS[arch])))
        except Exception:  # the compilation will say so, as this entry's result
            listing.append((label, str(index)))
    return listing


def _compile_entry(arch: str, index: int) -> dict:
    import triton

    from fastmixer.aot.compile import compile_launch, why_not_fits

    start = time.perf_counter()
    _, launch = _entries(arch)[index]
    try:
        row = compile_launch(launch, TARGETS[arch])
        error = why_not_fits(row)
        row["multiplies"] = "INPUT_PRECISION" in launch.args  # as every kernel with a matrix product has
    except Exception as failure:  # whatever the compiler says is the result: it becomes the report's
        row, error = {"triton": triton.__version__}, _explain(failure)
    return {**row, "ok": error is None, "error": error, "seconds": round(time.perf_counter() - start, 2)}


def _explain(error: BaseException) -> str:
    """The message with those of its causes: Triton reports a call, and why the callee failed as its cause."""
    text = f"{type(error).__name__}: {error}"
    return text if error.__cause__ is None else f"{text}\nbecause of {_explain(error.__cause__)}"


# ---- What the user sees.


def _print_tables(archs: Sequence[str], rows: list[dict]) -> None:
    from rich.markup import escape

    console = wide_console()
    for arch in archs:
        of_arch = [row for row in rows if row["arch"] == arch]
        version = next((row["triton"] for row in of_arch if "triton" in row), "?")
        title = f"{arch}, Triton {version}"
        kernels = table("kernel", *COLUMNS, "", texts=("kernel", ""), title=title)
        for row in of_arch:
            verdict = "[green]ok[/]" if row["ok"] else "[red]fails[/]"
            kernels.add_row(escape(row["label"]), *_cells(row), verdict)
        console.print(kernels)
        failures = [(row["error"], row["label"]) for row in of_arch if not row["ok"]]
        console.print(_grouped(failures), style="red", markup=False, end="")
        if arch == "sm_90":
            reasons = [(exception(row["label"], row), row["label"]) for row in of_arch if "registers" in row]
            known = [(reason or "no reason known", label) for reason, label in reasons if reason is not None]
            console.print(_grouped(known), markup=False, end="")
    failed = sum(not row["ok"] for row in rows)
    console.print(
        f"{len(rows) - failed} of {len(rows)} compile and fit. per SM: programs that fit at a time. "
        "waits: for all wgmma in flight, in one step of the loop. per element: instructions for each hidden "
        "element (token mixing) or, behind the loop, output element. issue: a scheduler's slots over the "
        "tensor cores' cycles."
    )


def _grouped(pairs: Iterable[tuple[str, str]]) -> str:
    """(reason, label) pairs as paragraphs: all the labels of a reason, and the reason."""
    labels: dict[str, list[str]] = {}
    for reason, label in pairs:
        labels.setdefault(reason, []).append(label)
    return "".join(f"{', '.join(group)}:\n{reason}\n\n" for reason, group in labels.items())


def _cells(row: dict) -> list[str]:
    """What a row shows in COLUMNS."""
    if "registers" not in row:
        return ["-"] * len(COLUMNS)
    products = (f"{row[name.lower()]} {name}" for name in PRODUCTS if row[name.lower()])
    return [
        str(row["registers"]),
        str(row["spills"]),
        str(row["loop_spills"]),
        f"{row['shared_memory'] / 1024:.1f}",
        str(row["programs_per_multiprocessor"]),
        ", ".join(products) or "-",
        ("serialised" if row["serialised"] else "overlap") if row["hgmma"] else "-",
        str(row["full_waits"]) if row["hgmma"] else "-",
        "-" if row["per_element"] is None else f"{row['per_element']:.1f}",
        "-" if row["issue_share"] is None else f"{row['issue_share']:.2f}",
    ]
