"""What a kernel runs with, or what runs in its place: pure functions, testable without a GPU."""

from .targets import INTERPRETER, TARGETS, Target, target_of
from .tiles import (
    ALIGNED,
    NORM_WARPS,
    ONE_PASS,
    ONE_PASS_TOKENS,
    WGRAD_WAVES,
    Choice,
    Library,
    Problem,
    TileConfig,
    next_power_of_2,
    round_up,
    select,
    sum_tile,
    token_pieces,
    wgrad_in_one_launch,
)

__all__ = [
    "ALIGNED",
    "INTERPRETER",
    "NORM_WARPS",
    "ONE_PASS",
    "ONE_PASS_TOKENS",
    "TARGETS",
    "WGRAD_WAVES",
    "Choice",
    "Library",
    "Problem",
    "Target",
    "TileConfig",
    "next_power_of_2",
    "round_up",
    "select",
    "sum_tile",
    "target_of",
    "token_pieces",
    "wgrad_in_one_launch",
]
