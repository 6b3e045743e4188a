"""How likely a run of the generated cases is to fail by chance: ``python tests/false_alarms.py --count 100``.

The criterion compares two roundings, and both are luck. Draws cases as the tests do, notes how much of its
bound the worst tensor of each takes, and extrapolates the tail beyond 1: the excesses over the 90% quantile
are taken to be exponential (a generalised Pareto distribution of shape 0; its fitted shape is printed, and a
negative one, a tail that ends, makes the estimate too high). docs/development.md has the outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import draws
import numpy as np
import torch
from scipy import stats
from support import run_case, run_gradients


def worst(direction: str, part: str, draw: str) -> float:
    """How much of its bounds the worst tensor of a draw takes; 1 is the verdict's edge."""
    device = torch.device("cpu")
    if direction == "forward":
        case = draws.forward_case(part, draw)
        return run_case(part, case, device, draws.forward_repeats(case)).share_of_bound
    case = draws.gradient_case(part, draw)
    found = run_gradients(part, case, device, draws.gradient_repeats(case, draws.DRAWN_ELEMENTS))
    return max(result.share_of_bound for result in found.values())


def estimate(shares: list[float]) -> dict[str, float]:
    """The chance that one draw exceeds its bound, extrapolated from the largest tenth of the shares."""
    threshold = float(np.quantile(shares, 0.9))
    excesses = np.array([value - threshold for value in shares if value > threshold])
    chance = 0.1 * float(np.exp(-(1 - threshold) / excesses.mean()))
    shape, *_ = stats.genpareto.fit(excesses, floc=0)
    return {"draws": len(shares), "largest": max(shares), "90%": threshold, "shape": shape, "chance": chance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="draws of each part and direction")
    parser.add_argument("--seed", default="false alarms")
    parser.add_argument("--direction", choices=("forward", "gradients"), nargs="+")
    parser.add_argument("--output", type=Path, help="a JSON line for each draw")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for direction in options.direction or ("forward", "gradients"):
        found = []
        for number in range(options.count):
            for part in draws.PARTS:
                found.append(worst(direction, part, f"{options.seed}-{number}"))
                if options.output:
                    with options.output.open("a") as file:
                        print(json.dumps([direction, part, number, found[-1]]), file=file)
        print(direction, {name: float(f"{value:.3g}") for name, value in estimate(found).items()})


if __name__ == "__main__":
    main()
