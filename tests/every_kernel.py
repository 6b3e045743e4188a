"""A script that runs every kernel once, for NVIDIA's tools: ``test_sanitizer``, and ``evidence`` by itself.

Both designs of token mixing, both memory modes, a scale, sizes that fill no tile.
"""

EVERY_KERNEL = """
import sys

import torch

import fastmixer

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
print("every kernel ran on", device)
"""
