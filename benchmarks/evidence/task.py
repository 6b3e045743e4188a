"""What a stage's process knows: where its results go, and whether there is a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from fastmixer.benchmarks.levels import Subject


@dataclass(frozen=True)
class Task:
    """name: of the stage. out: the folder of all results. dry: on a CPU, as small as can be."""

    name: str
    out: Path
    dry: bool

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def results(self) -> Path:
        """The stage's file: an object a line, each written at once."""
        return self.out / "results" / f"{self.name}.jsonl"

    def subject(self, level: str, batch: int, direction: str = "forward") -> Subject:
        """Of B/16 in bf16; in a dry run of S/32 in fp32, at batch 1."""
        import torch
        from fastmixer.benchmarks import levels

        model, dtype = ("S/32", "float32") if self.dry else ("B/16", "bfloat16")
        case = levels.make_case(level, model, 1 if self.dry else batch, dtype, direction)
        with torch.set_grad_enabled(case.trains):
            return levels.make_subject(case, self.device)

    def note(self, what: str, *, ok: bool = True, **figures: object) -> None:
        """Adds a row."""
        row = json.dumps({"what": what, "ok": ok, **figures}, default=str)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(row + "\n")
        print(row, flush=True)

    def rows(self) -> list[dict]:
        """What has been noted so far, by whichever process."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        return [json.loads(line) for line in lines]

    def attempt(self, what: str, function: Callable[[], dict]) -> bool:
        """Notes what ``function`` returns, or its exception; whether all was well."""
        try:
            row = {"ok": True, **function()}
        except Exception as error:  # whatever it is: the next attempt may still tell something
            row = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}"}
        self.note(what, **row)
        return row["ok"]

    def attempt_all(self, checks: dict[str, Callable[[], dict]]) -> int:
        """Attempts one after the other; the stage's exit code: 0 if all was well."""
        return 0 if all([self.attempt(what, check) for what, check in checks.items()]) else 1


def judged(verdicts: dict) -> dict:
    """Parities by name as a row: the worst, and what failed."""
    worst = max(verdicts, key=lambda name: verdicts[name].share_of_bound)
    failed = {name: str(verdict) for name, verdict in verdicts.items() if not verdict.ok}
    return {"ok": not failed, "worst": worst, "ratio": round(verdicts[worst].ratio, 3), "failed": failed}
