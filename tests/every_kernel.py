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
from fastmixer.blocks.block import fused_blocks
from fastmixer.ops import autograd, channel_mixing, launch
from fastmixer.ops.row_moments import joined

launched = set()


def execute(item):
    launched.add(item.kernel)
    launch.execute(item)


device, dtype = sys.argv[1], torch.bfloat16
context = replace(launch.context_of(torch.device(device), kernels_only=True), execute=execute)
torch.manual_seed(0)
for tokens in (21, 300):
    block = fastmixer.MixerBlock(40, tokens, mlp_ratio=(0.5, 2.0), drop_path=0.5, device=device, dtype=dtype)
    x = torch.randn(2, tokens, 40, device=device, dtype=dtype, requires_grad=True)
    _, _, block_structure = next(fused_blocks(block))
    token, channel = block_structure.token, block_structure.channel
    for lean in (False, True):  # without a plan, which puts many tensors into one allocation
        halves = {"token": token.params(token.draw(x)), "channel": channel.params(channel.draw(x))}
        with launch.device_of(x):
            autograd.mix(x, halves, dtype, context, lean=lean).square().sum().backward()
    with fastmixer.backend("triton"):
        block(x).square().sum().backward()
    with fastmixer.backend("triton"), torch.no_grad():
        assert block.eval()(x).isfinite().all()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters())


def library(op, problem, target):
    chosen = configs.choose_kernels(op, problem, target)
    return configs.Library.ATEN if op.startswith("channel_fc") else chosen


def added(op, problem, target):  # fc1 writes ones behind the hidden
    return configs.Library.ADDMM if op == "channel_fc2" else configs.choose_kernels(op, problem, target)


norm, mlp = block.norm2, block.mlp_channels
params = fastmixer.MixingParams(
    norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
)
with torch.no_grad(), launch.device_of(x):
    for choose in (library, added):
        assert channel_mixing.forward(x, params, dtype, replace(context, choose=choose)).isfinite().all()
    assert joined(torch.rand(3, 2, 21, device=device), 70, context).isfinite().all()
kernels = {name: kernel for name, kernel in vars(launch.kernels()).items() if hasattr(kernel, "run")}
missing = [name for name, kernel in kernels.items() if kernel not in launched]
assert not missing, missing
print("every kernel ran on", device)
"""
