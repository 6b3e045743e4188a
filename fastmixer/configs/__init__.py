"""What a kernel runs with, or what runs in its place: pure functions, testable without a GPU."""

from fastmixer.configs.choice import choose, choose_kernels, edition, explained, select, select_kernels
from fastmixer.configs.designs import designs_of, forced
from fastmixer.configs.ops import ONE_PASS, ONE_PASS_TOKENS
from fastmixer.configs.problem import (
    Choice,
    Library,
    Problem,
    TileConfig,
    bucketed,
    cdiv,
    next_power_of_2,
    round_up,
)
from fastmixer.configs.targets import (
    DEVICES,
    INTERPRETER,
    TARGETS,
    Target,
    device_data,
    target_named,
    target_of,
)
from fastmixer.configs.tiles import (
    ALIGNED,
    NORM_WARPS,
    pieces_of,
    rule,
    sum_tile,
    token_pieces,
    wgrad_in_one_launch,
    wgrad_splits,
)

__all__ = [
    "ALIGNED", "DEVICES", "INTERPRETER", "NORM_WARPS", "ONE_PASS", "ONE_PASS_TOKENS", "TARGETS",
    "Choice", "Library", "Problem", "Target", "TileConfig", "bucketed", "cdiv", "choose", "choose_kernels",
    "designs_of", "device_data", "edition", "explained", "forced", "next_power_of_2", "pieces_of", "round_up",
    "rule", "select", "select_kernels", "sum_tile", "target_named", "target_of", "token_pieces",
    "wgrad_in_one_launch", "wgrad_splits",
]  # fmt: skip
