"""The reference against the ideas of the paper, written out in other ways, and against eager timm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmixer import reference
from fastmixer.blocks.model import PatchEmbed
from fastmixer.params import MixingParams

B, H, W, C, D, E = 2, 3, 4, 10, 7, 13
S = H * W
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def make_half(
    mixes: str, dtype: torch.dtype = torch.float64, norm_dtype: torch.dtype | None = None
) -> MixingParams:
    features, hidden = (S, D) if mixes == "tokens" else (C, E)
    norm_dtype = norm_dtype or dtype
    return MixingParams(
        random(C, dtype=norm_dtype),
        random(C, dtype=norm_dtype),
        random(hidden, features, dtype=dtype),
        random(hidden, dtype=dtype),
        random(features, hidden, dtype=dtype),
        random(features, dtype=dtype),
    )


def assert_same_sums(actual: Tensor, expected: Tensor, terms: int) -> None:
    """Equal but for the order in which sums of up to ``terms`` float64 numbers were taken."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float64
    bound = 4 * terms * torch.finfo(torch.float64).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_patch_stem_is_a_linear_layer_on_flattened_patches() -> None:
    stem = PatchEmbed(img_size=8, patch_size=4, in_chans=3, embed_dim=5, dtype=torch.float64)
    images = random(2, 3, 8, 8)
    patches = images.reshape(2, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 3 * 4 * 4)
    expected = F.linear(patches, stem.proj.weight.flatten(1), stem.proj.bias)
    assert_same_sums(stem(images), expected, terms=3 * 4 * 4)


def test_channel_mixing_is_a_1x1_convolution() -> None:
    x, params = random(B, S, C), make_half("channels")
    image = (
        F.layer_norm(x, (C,), params.norm_weight, params.norm_bias, 1e-6).transpose(1, 2).reshape(B, C, H, W)
    )
    hidden = F.gelu(F.conv2d(image, params.fc1_weight[..., None, None], params.fc1_bias))
    mixed = F.conv2d(hidden, params.fc2_weight[..., None, None], params.fc2_bias)
    expected = x + mixed.flatten(2).transpose(1, 2)
    assert_same_sums(reference.channel_mixing(x, **params._asdict()), expected, terms=C + E)


def test_token_mixing_is_a_convolution_over_tokens() -> None:
    x, params = random(B, S, C), make_half("tokens")
    n = F.layer_norm(x, (C,), params.norm_weight, params.norm_bias, 1e-6)
    hidden = F.gelu(F.conv1d(n, params.fc1_weight[..., None], params.fc1_bias))
    expected = x + F.conv1d(hidden, params.fc2_weight[..., None], params.fc2_bias)
    assert_same_sums(reference.token_mixing(x, **params._asdict()), expected, terms=S + D)


def test_token_mixing_is_one_set_of_full_image_depthwise_kernels_shared_by_all_channels() -> None:
    x, params = random(B, S, C), make_half("tokens")
    n = F.layer_norm(x, (C,), params.norm_weight, params.norm_bias, 1e-6)
    image = n.transpose(1, 2).reshape(B, C, H, W)
    kernels = params.fc1_weight.reshape(D, 1, H, W).repeat(C, 1, 1, 1)  # the same D kernels for every channel
    hidden = F.gelu(F.conv2d(image, kernels, params.fc1_bias.repeat(C), groups=C))  # (B, C * D, 1, 1)
    mixed = F.linear(hidden.reshape(B, C, D), params.fc2_weight, params.fc2_bias)
    assert_same_sums(reference.token_mixing(x, **params._asdict()), x + mixed.transpose(1, 2), terms=S + D)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_exactly_as_eager_timm(dtype: torch.dtype, approximate: str) -> None:
    import timm.models.mlp_mixer as timm_mixer

    block = timm_mixer.MixerBlock(C, S, act_layer=lambda: torch.nn.GELU(approximate), dtype=dtype).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = random(B, S, C, dtype=dtype)
    token, channel = (
        MixingParams(*norm.parameters(), *mlp.parameters(), norm.eps, approximate)
        for norm, mlp in ((block.norm1, block.mlp_tokens), (block.norm2, block.mlp_channels))
    )
    assert torch.equal(reference.mixer_block(x, token, channel), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_exactly_as_eager_timm_under_autocast(dtype: torch.dtype) -> None:
    import timm.models.mlp_mixer as timm_mixer

    block = timm_mixer.MixerBlock(C, S).eval()
    token, channel = (
        MixingParams(*norm.parameters(), *mlp.parameters())
        for norm, mlp in ((block.norm1, block.mlp_tokens), (block.norm2, block.mlp_channels))
    )
    x = random(B, S, C, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        result = reference.mixer_block(x, token, channel)
        assert torch.equal(result, block(x))
    assert result.dtype == torch.float32
    assert not torch.equal(result, block(x)), "autocast was not in force"


def test_float64_stays_float64_under_autocast() -> None:
    x, params = random(B, S, C), make_half("tokens")
    expected = reference.token_mixing(x, **params._asdict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference.token_mixing(x, **params._asdict()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_x_beside_16_bit_weights_computes_in_16_bits_and_returns_float32(dtype: torch.dtype) -> None:
    x = random(B, S, C, dtype=torch.float32)
    params = make_half("channels", dtype, norm_dtype=torch.float32)
    n = F.layer_norm(x, (C,), params.norm_weight, params.norm_bias, 1e-6).to(dtype)
    hidden = F.gelu(F.linear(n, params.fc1_weight, params.fc1_bias))
    expected = x + F.linear(hidden, params.fc2_weight, params.fc2_bias)
    result = reference.channel_mixing(x, **params._asdict())
    assert result.dtype == torch.float32 and torch.equal(result, expected)


def test_float32_norm_parameters_beside_16_bit_x_normalise_in_float32() -> None:
    x = random(B, S, C, dtype=torch.bfloat16)
    params = make_half("tokens", torch.bfloat16, norm_dtype=torch.float32)
    n = F.layer_norm(x.float(), (C,), params.norm_weight, params.norm_bias, 1e-6).bfloat16().transpose(1, 2)
    hidden = F.gelu(F.linear(n, params.fc1_weight, params.fc1_bias))
    expected = x + F.linear(hidden, params.fc2_weight, params.fc2_bias).transpose(1, 2)
    result = reference.token_mixing(x, **params._asdict())
    assert result.dtype == torch.bfloat16 and torch.equal(result, expected)


@pytest.mark.parametrize("mixing", ["token", "channel"])
def test_every_parameter_but_the_weights_may_be_absent(mixing: str) -> None:
    function = getattr(reference, f"{mixing}_mixing")
    params = make_half(f"{mixing}s")
    zeroed = params._replace(
        norm_weight=torch.ones_like(params.norm_weight),
        norm_bias=torch.zeros_like(params.norm_bias),
        fc1_bias=torch.zeros_like(params.fc1_bias),
        fc2_bias=torch.zeros_like(params.fc2_bias),
    )
    absent = params._replace(norm_weight=None, norm_bias=None, fc1_bias=None, fc2_bias=None)
    x = random(B, S, C)
    assert_same_sums(function(x, **absent._asdict()), function(x, **zeroed._asdict()), terms=S + C)


@pytest.mark.parametrize("mixing", ["token", "channel"])
@pytest.mark.parametrize("shape", [(), (B,), (B, 1, 1), "float"], ids=str)
def test_residual_scale_multiplies_the_branch_of_each_sample(mixing: str, shape: tuple | str) -> None:
    function = getattr(reference, f"{mixing}_mixing")
    params, x = make_half(f"{mixing}s"), random(B, S, C)
    scale = 0.3 if shape == "float" else random(*shape)
    factors = (
        torch.as_tensor(scale, dtype=torch.float64).expand(B) if shape in ((), "float") else scale.flatten()
    )
    branch = function(x, **params._asdict()) - x
    result = function(x, **params._replace(residual_scale=scale)._asdict())
    assert_same_sums(result, x + factors.reshape(B, 1, 1) * branch, terms=S + C)


def test_a_wider_residual_scale_does_not_widen_the_result() -> None:
    x, params = random(B, S, C, dtype=torch.bfloat16), make_half("channels", torch.bfloat16)
    scale = random(B, dtype=torch.float32)
    branch = reference.channel_mixing(torch.zeros_like(x), **params._asdict())
    result = reference.channel_mixing(torch.zeros_like(x), **params._replace(residual_scale=scale)._asdict())
    assert torch.equal(result, (branch * scale.reshape(B, 1, 1)).bfloat16())


def test_eps_and_approximate_are_used() -> None:
    x, params = random(B, S, C), make_half("tokens")
    plain = reference.token_mixing(x, **params._asdict())
    for change in ({"eps": 0.1}, {"approximate": "tanh"}):
        assert not torch.equal(reference.token_mixing(x, **params._replace(**change)._asdict()), plain)


def test_batch_of_none_and_strided_views() -> None:
    token, channel = make_half("tokens"), make_half("channels")
    assert reference.mixer_block(random(0, S, C), token, channel).shape == (0, S, C)
    x = random(B, S, C)
    view = torch.cat([x, x], dim=2).transpose(0, 2)[:C].transpose(0, 2)
    assert not view.is_contiguous()
    assert torch.equal(
        reference.mixer_block(view, token, channel), reference.mixer_block(view.contiguous(), token, channel)
    )


@pytest.mark.parametrize("mixing", ["token", "channel"])
def test_gradients_of_all_inputs(mixing: str) -> None:
    function = getattr(reference, f"{mixing}_mixing")
    params = make_half(f"{mixing}s")._replace(residual_scale=random(B))
    tensors = [random(B, S, C), *params[:6], params.residual_scale]

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        *parameters, scale = rest
        return function(x, *parameters, residual_scale=scale)

    assert torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in tensors], fast_mode=True)
