"""``python -m benchmarks.host``: what a fused block takes of the host's time, in microseconds, and on what.

A call is timed until it returns, not until the GPU is done. The parts of an eval call:

- checks: the module's call, and what is looked at before ``functional.prepared``;
- plan: ``functional.prepared``, which finds it;
- allocation and binding: the plan's call without its launches;
- launches: Triton's own launcher, given ready arguments;
- above Triton's launcher: what the plan's call takes beyond its allocations and ``CompiledKernel.run``.

The first four are differences of longer and shorter calls and add up to the whole. One alone in a loop takes
less than it does here, as nothing else is in the CPU's caches then.

Without a GPU this runs on CPU tensors over a stub driver (``cuda_stub.c``), whose kernels do nothing. What
CUDA takes for a launch is then not in the times, allocations are the CPU's, and PyTorch's products in the
backward (``torch.mm``, ``bmm``, ``addmm``) only allocate. With ``--against`` both codes get the same of it.

Every measurement is a process of its own, ``host_times.py``; of two codes they take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastmixer.usage import UsageError, dtype_argument, positive

from . import stub_driver

DONE, FAILED, MISUSED = 0, 1, 2
PROCESSES = 3  # of each code, where two are compared
PEERS = {"eager": "eager", "compile": "torch.compile", "max_autotune": "max-autotune"}  # in the table


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and returns an exit code, which ``--help`` explains."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or its complaint
        return int(stop.code or 0)
    try:
        report = _report(options)
    except UsageError as error:
        print(f"host: {error}", file=sys.stderr)
        return MISUSED
    except subprocess.CalledProcessError as error:
        print(f"host: exit code {error.returncode} of {error.cmd}\n{error.stderr}", file=sys.stderr)
        return FAILED
    print(_shown(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return DONE


def _report(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` writes."""
    import torch

    import fastmixer

    from . import files
    from .levels import shape_of

    if options.json and not options.json.parent.is_dir():
        raise UsageError(f"--json: there is no folder {options.json.parent}")
    on_gpu = torch.cuda.is_available()
    shape = shape_of(options.model)
    sizes = options.sizes or (shape.tokens, shape.channels, shape.token_hidden, shape.channel_hidden)
    asked = {name: getattr(options, name) for name in ("batch", "dtype", "repetitions")}
    asked |= {"sizes": sizes, "gpu": on_gpu}
    trees = {"new": Path(fastmixer.__file__).resolve().parents[1]}
    with contextlib.ExitStack() as stack:
        stub = None if on_gpu else stack.enter_context(_stub())
        against = None
        if options.against:
            trees["old"], against = stack.enter_context(_worktree(trees["new"], options.against))
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for _ in range(PROCESSES if against else 1):
            for name, tree in trees.items():
                peers = on_gpu and name == "new" and not found[name]  # they take minutes to compile
                found[name].append(_measured(tree, asked | {"peers": peers}, stub))
    first = found["new"][0]
    adds = [process["add"] for processes in found.values() for process in processes]
    return {
        "environment": {
            "cpu": files.cpu_name(), "gpu": first["gpu"], "versions": first["versions"],
            **files.git_state(trees["new"]), "against": against,
        },
        "protocol": {"model": options.model, **asked, "processes": len(found["new"])},
        "launches": first["launches"],
        "add_us": statistics.median(adds),
        "rows": _rows(found["new"], found.get("old", []), first["peers"]),
    }  # fmt: skip


def _rows(
    new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]], peers: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Medians of the processes' medians, and ratios to the others', None where they have no such row."""
    rows = []
    for name in new[0]["rows"]:
        us = statistics.median(process["rows"][name] for process in new)
        others = {peer: times.get(name) for peer, times in peers.items()}
        if old:
            times = [process["rows"][name] for process in old if name in process["rows"]]
            others = {"old": statistics.median(times) if times else None, **others}
        row = {"name": name, "us": us}
        for other, time in others.items():
            row |= {f"{other}_us": time, f"new_to_{other}": None if time is None else us / time}
        rows.append(row)
    return rows


def _shown(report: dict[str, Any]) -> str:
    """The report as text."""
    from . import tables

    environment, protocol = report["environment"], report["protocol"]
    titles = {"us": "us", "old_us": "old us", "new_to_old": "new / old"}
    titles |= {f"new_to_{peer}": f"us / {title}'s" for peer, title in PEERS.items()}
    rows = [
        {"host time of": row["name"]}
        | {title: tables.figure(row[key]) for key, title in titles.items() if key in row}
        for row in report["rows"]
    ]
    against = f", against {environment['against'][:12]}" if environment["against"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = (environment["commit"] or "unknown")[:12] + (", changed" if environment["dirty"] else "")
    lines = [
        f"a block of {protocol['model']}, batch {protocol['batch']}, {protocol['dtype']}: "
        f"{report['launches']} launches in eval",
        f"{environment['gpu'] or 'no GPU, a stub driver'}; {environment['cpu']}; {versions}",
        f"commit {commit}{against}; medians of {protocol['repetitions']} repetitions, and of "
        f"{protocol['processes']} processes of each code",
        f"torch.add of 4 numbers: {report['add_us']:.2f} us",
        "",
        tables.table(rows),
    ]
    if not protocol["gpu"]:
        lines += ["", f"beside {', '.join(PEERS.values())}: needs a GPU"]
    return "\n".join(lines)


def _measured(tree: Path, asked: dict[str, Any], stub: Path | None) -> dict[str, Any]:
    """What a new process finds for the code in ``tree``; subprocess.CalledProcessError if it fails."""
    # The interpreter's times mean nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= stub_driver.variables(stub) if stub else {}
    paths = filter(None, [str(tree), os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, str(Path(__file__).with_name("host_times.py")), json.dumps(asked)]
    ran = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    if Path(found["code"]) != tree:
        raise RuntimeError(f"a process for the code in {tree} found that in {found['code']}")
    return found


@contextlib.contextmanager
def _stub() -> Iterator[Path]:
    """A folder with the stub driver; UsageError where it cannot be built."""
    if importlib.util.find_spec("triton") is None:
        raise UsageError("needs Triton")
    with tempfile.TemporaryDirectory(prefix="fastmixer-stub-") as folder:
        try:
            stub_driver.build(Path(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            raise UsageError(f"without a GPU it needs a C compiler: {error}") from error
        yield Path(folder)


@contextlib.contextmanager
def _worktree(clone: Path, revision: str) -> Iterator[tuple[Path, str]]:
    """A folder with the files of a commit, and its hash; UsageError where there is no such commit."""

    def git(*args: str | Path) -> str:
        command = ["git", "-C", clone, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"--against: there is no commit {revision!r} in {clone}") from error
    with tempfile.TemporaryDirectory(prefix="fastmixer-host-") as folder:
        tree = Path(folder).resolve() / "tree"
        git("worktree", "add", "--detach", tree, commit)
        try:
            yield tree, commit
        finally:
            git("worktree", "remove", "--force", tree)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host",
        description="Times the host's side of a fused block, on a GPU or over a stub driver. Exit codes: 0 "
        "measured; 1 a measuring process failed; 2 it cannot be measured as asked.",
    )
    add = parser.add_argument
    add("--model", default="B/16", metavar="NAME", help="whose block; default: B/16")
    add("--batch", type=positive, default=1, metavar="N", help="default: 1")
    add("--dtype", type=dtype_argument, default="bfloat16", help="bf16 (default), fp16 or fp32")
    add("--against", metavar="REV", help="compare with another commit of this clone")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add("--repetitions", type=positive, default=200, metavar="N", help="of 10 calls each; default: 200")
    add("--sizes", nargs=4, type=positive, help=argparse.SUPPRESS)  # S, C, D, E in place of the model's
    return parser


if __name__ == "__main__":
    sys.exit(main())
