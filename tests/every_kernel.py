"""A script that runs every kernel once, for NVIDIA's tools: ``test_sanitizer``, and ``evidence`` by itself.

Both designs of token mixing, both memory modes, a scale, sizes that fill no tile; the passes beside a
library's products, and what only a trace launches.
"""

EVERY_KERNEL = """
import sys
from dataclasses import replace

import torch

import fastmixer
from fastmixer import configs
from fastmixer.ops import channel_mixing, launch
from fastmixer.ops.row_moments import joined

launched, Launch = set(), launch.Launch
launch.Launch = lambda kernel, *args: (launched.add(kernel), Launch(kernel, *args))[1]
device, dtype = sys.argv[1], torch.bfloat16
torch.manual_seed(0)
for tokens in (21, 300):
    block = fastmixer.MixerBlock(40, tokens, mlp_ratio=(0.5, 2.0), drop_path=0.5, device=device, dtype=dtype)
    x = torch.randn(2, tokens, 40, device=device, dtype=dtype, requires_grad=True)
    for memory in ("balanced", "lean"):
        with fastmixer.backend("triton"), fastmixer.memory(memory):
            block.train()(x).square().sum().backward()
    with fastmixer.backend("triton"), torch.no_grad():
        assert block.eval()(x).isfinite().all()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters())


def library(op, problem, target):
    chosen = configs.choose_kernels(op, problem, target)
    return configs.Library.ATEN if op.startswith("channel_fc") else chosen


norm, mlp = block.norm2, block.mlp_channels
params = fastmixer.MixingParams(
    norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
)
context = launch.context_of(x.device, kernels_only=True)
with torch.no_grad(), launch.device_of(x):
    assert channel_mixing.forward(x, params, dtype, replace(context, choose=library)).isfinite().all()
    assert joined(torch.rand(3, 2, 21, device=device), 70, context).isfinite().all()
kernels = {name: kernel for name, kernel in vars(launch.kernels()).items() if hasattr(kernel, "run")}
missing = [name for name, kernel in kernels.items() if kernel not in launched]
assert not missing, missing
print("every kernel ran on", device)
"""
