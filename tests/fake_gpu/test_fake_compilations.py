"""What compiles anew on the fake device: no other batch, and nothing that another process compiled."""

from __future__ import annotations

import multiprocessing
from collections import Counter, defaultdict

import pytest
import torch
from fake_cuda import Gpu
from test_fake_block import ONE_PASS

import fastmixer
from fastmixer import configs, functional
from fastmixer.aot.compile import code_key
from fastmixer.aot.recording import meta, meta_params, recording
from fastmixer.configs import Problem, choose_kernels
from fastmixer.configs.models import MODEL_BLOCKS
from fastmixer.configs.ops import OPS
from fastmixer.ops import autograd, launch
from fastmixer.params import MixingParams

BF16 = torch.bfloat16
CHANNELS = 64
# Kernels that take their tiles from ``configs``, and the ops that they run.
TILED = {
    "token_mixing": ("token_mixing",),
    "fc1": ("token_fc1", "channel_fc1"),
    "fc2": ("token_fc2", "channel_fc2"),
    "mlp_hidden_bwd": ("token_mlp_hidden_bwd_recompute", "channel_mlp_hidden_bwd"),
    "token_dgrad": ("token_dgrad",),
    "token_wgrad": ("token_wgrad_fc1", "token_wgrad_fc2"),
    "layer_norm_fwd": ("layer_norm_fwd", "layer_norm_fwd_transposed"),
    "layer_norm_bwd": ("layer_norm_bwd",),
}
LATER = (63, 37, 1, 1000)  # after 64


def inputs(batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, tokens, CHANNELS, device="cuda", dtype=BF16)


def new_tiles(tokens: int, batch: int) -> set[str]:
    """The kernels whose tiles for ``batch`` are not those that 64 and the batches between have."""
    target, found = configs.target_of(torch.device("cuda")), set()
    before = [64, *LATER[: LATER.index(batch)]]
    for kernel, ops in TILED.items():
        for op in ops:
            hidden = tokens // 2 if op.startswith("token") else 4 * CHANNELS
            problem = Problem(batch, tokens, CHANNELS, hidden, BF16, BF16)
            known = {choose_kernels(op, problem._replace(batch=b), target) for b in before}
            if choose_kernels(op, problem, target) not in known:
                found.add(kernel)
    return found


def check_batches(gpu: Gpu, tokens: int, run) -> None:
    """Other batches compile only kernels with other tiles: 63 and 37 none, their tiles are those of 64."""
    run(inputs(64, tokens))
    assert gpu.compiled()
    for batch in LATER:
        run(inputs(batch, tokens))
        compiled, allowed = set(gpu.compiled()), new_tiles(tokens, batch)
        assert compiled <= allowed, f"batch {batch}: {compiled - allowed}"
        assert not compiled or batch not in (63, 37)
    assert gpu.launched()


@pytest.mark.parametrize("tokens", [196, 300], ids=["one pass", "two passes"])
def test_inference_of_another_batch(gpu: Gpu, tokens: int) -> None:
    model = fastmixer.MixerBlock(CHANNELS, tokens, drop_path=0.5, device="cuda", dtype=BF16).eval()
    with torch.no_grad(), fastmixer.backend("triton"):
        check_batches(gpu, tokens, model)
        # One pass has code of its own for an x that is not contiguous. Rows that are 16-byte aligned like the
        # contiguous ones are loaded by the same code elsewhere; others are not.
        model(torch.cat([inputs(63, tokens)] * 2, dim=2)[..., CHANNELS:])
        assert gpu.compiled() == (["token_mixing"] if tokens == 196 else [])
        model(torch.cat([inputs(37, tokens)] * 2, dim=2)[..., CHANNELS:])
        assert gpu.compiled() == []
        odd = torch.empty(63, tokens, CHANNELS + 1, device="cuda", dtype=BF16)[..., :CHANNELS]
        model(odd)
        one_pass = ["row_moments", "token_mixing"]
        assert gpu.compiled() == (one_pass if tokens == 196 else ["row_moments", "fc1", "fc2"])


def test_inference_with_a_residual_scale(gpu: Gpu) -> None:
    """A number for all samples and one a sample are the same vector to the kernels."""
    model = fastmixer.MixerBlock(CHANNELS, 196, device="cuda", dtype=BF16).eval()

    def params(mlp: torch.nn.Module, norm: torch.nn.Module, scale: object) -> MixingParams:
        fc1, fc2 = mlp.fc1, mlp.fc2
        return MixingParams(
            norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm.eps, "none", scale
        )

    def run(x: torch.Tensor) -> None:
        for scale in 0.5, torch.rand(x.shape[0], device="cuda"):
            token = params(model.mlp_tokens, model.norm1, scale)
            functional.mixer_block(x, token, params(model.mlp_channels, model.norm2, scale))

    with torch.no_grad(), fastmixer.backend("triton"):
        check_batches(gpu, 196, run)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [196, 300], ids=["one pass", "two passes"])
def test_training_with_another_batch(gpu: Gpu, tokens: int) -> None:
    model = fastmixer.MixerBlock(CHANNELS, tokens, drop_path=0.5, device="cuda", dtype=BF16)
    with fastmixer.backend("triton"):
        check_batches(gpu, tokens, lambda x: model(x.requires_grad_()).sum().backward())


@pytest.mark.parametrize("model", ["B/16", "S/32"])
def test_batches_of_1_to_70_compile_once(gpu: Gpu, model: str) -> None:
    """By what Triton specialises each launch of a block's inference for; two of them natively, too."""
    S, C, D, E = MODEL_BLOCKS[model]
    target = configs.target_of(torch.device("cuda"))
    found: dict[str, set[str]] = defaultdict(set)
    for batch in range(1, 71):
        halves = {
            half: meta_params(half, Problem(batch, S, C, hidden, BF16, BF16))
            for half, hidden in (("token", D), ("channel", E))
        }
        with recording(target, configs.choose) as (context, launches):
            autograd.mix(meta(batch, S, C, dtype=BF16), halves, BF16, context)
        for item in launches:
            found[item.kernel_name].add(code_key(item, target))
    assert {name: len(keys) for name, keys in found.items()} == dict.fromkeys(ONE_PASS, 1)
    block = fastmixer.MixerBlock(C, S, (D / C, E / C), device="cuda", dtype=BF16).eval()
    with torch.no_grad(), fastmixer.backend("triton"):
        for batch in (1, 7):
            block(torch.empty(batch, S, C, device="cuda", dtype=BF16))
    assert sorted(gpu.compiled()) == sorted(ONE_PASS)


def test_descriptors_compile_once(gpu: Gpu) -> None:
    """Whatever the batch, one of a single sample too."""
    model = fastmixer.MixerBlock(CHANNELS, 196, device="cuda", dtype=BF16).eval()
    designs = {"channel_fc1": "tma_128x256_persistent", "channel_fc2": "tma_128x256"}
    with torch.no_grad(), fastmixer.backend("triton"), configs.forced(**designs):
        model(inputs(64, 196))
        assert sorted(gpu.compiled()) == sorted(ONE_PASS)
        for batch in (63, 37, 1):
            model(inputs(batch, 196))
        assert gpu.compiled() == []


def compile_elsewhere(op: str, problem: Problem, design: str) -> str | None:
    """As a worker of the tuner does, which meets the kernels in another order."""
    from fastmixer.tune.machine import compile_choice

    target = configs.TARGETS["sm_90"]
    return compile_choice(op, problem, configs.designs_of(op, problem, target)[design], target)


@pytest.mark.parametrize(
    ("op", "design"),
    [("channel_mlp_hidden_bwd", "rule"), ("channel_fc2", "tma_128x256")],
)
def test_what_a_worker_compiled_is_not_compiled_again(
    gpu: Gpu, tmp_path, monkeypatch, op: str, design: str
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    problem = Problem(2, 32, 64, 256, BF16, BF16)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(compile_elsewhere, (op, problem, design)) is None
    from triton import knobs

    hits: Counter[tuple[str, bool]] = Counter()
    monkeypatch.setattr(
        knobs.compilation, "listener",
        lambda *, src, cache_hit, **_: hits.update([(src.name, cache_hit)]),
    )  # fmt: skip
    model = fastmixer.MixerBlock(64, 32, device="cuda", dtype=BF16)
    with fastmixer.backend("triton"), configs.forced(**{op: design}):
        y = model(torch.randn(2, 32, 64, device="cuda", dtype=BF16))
        if OPS[op].direction == "backward":
            y.sum().backward()
    kernel = f"_{OPS[op].kernel}_kernel"
    assert hits[kernel, True] == 1 and not hits[kernel, False], hits
    assert hits["_fc1_kernel", False], "the listener sees what is compiled"


def keys(names: list[str]) -> dict[str, str]:
    """The kernels' keys in Triton's cache on disk, asked for in this order."""
    return {name: getattr(launch.kernels(), name).cache_key for name in names}


def test_a_kernel_has_one_key_whatever_was_hashed_before(gpu: Gpu) -> None:
    from triton.runtime.jit import JITFunction

    names = [name for name, value in vars(launch.kernels()).items() if isinstance(value, JITFunction)]
    assert len(names) == 14
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.map(keys, [names, names[::-1]], chunksize=1)
    assert found[0] == found[1]
