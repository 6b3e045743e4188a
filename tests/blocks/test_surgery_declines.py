"""What fuse declines and why, and what a fused block does when it is changed afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import foreign_blocks as foreign
import pytest
import torch
import torch.nn.utils.prune
from foreign_blocks import DIM, SEQ, Plain, PostNorm, make_model
from torch import Tensor, nn

import fastmixer


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


def test_gmixer_is_declined_by_its_structure() -> None:
    from timm.layers import GluMlp

    model = make_model(mlp_layer=GluMlp, act_layer=nn.SiLU, mlp_ratio=(1.0, 4.0))
    report = fastmixer.fuse(model)
    assert len(report.declined) == 2
    for row in report:
        assert row.kind == "MixerBlock"
        assert "mlp_tokens (GluMlp): is gated" in row.reason
        assert "mlp_tokens (GluMlp): act is SiLU, not torch.nn.GELU" in row.reason
    assert all("forward" not in block.__dict__ for block in model.blocks)
    gated_gelu = make_model(mlp_layer=GluMlp, mlp_ratio=(1.0, 4.0))
    assert (
        "mlp_tokens (GluMlp): fc1 gives 24 features and fc2 takes 12"
        in fastmixer.fuse(gated_gelu).rows[0].reason
    )


@pytest.mark.parametrize(
    "name, kind, reason",
    [
        ("gmixer_24_224", "MixerBlock", "GluMlp.*SiLU"),
        ("resmlp_12_224", "ResBlock", "has no mlp_tokens; .*linear_tokens.*ls1, ls2.*norm1 is Affine"),
        ("gmlp_ti16_224", "SpatialGatingBlock", "has no mlp_tokens.*GatedMlp.*gate"),
    ],
)
def test_timms_other_families_are_listed_with_a_reason(name: str, kind: str, reason: str) -> None:
    import timm

    model = timm.create_model(name, device="meta")
    report = fastmixer.fuse(model)
    assert len(report) == len(model.blocks) == len(report.declined)
    for row in report:
        assert row.kind == kind
    with pytest.raises(ValueError, match=reason):
        fastmixer.fuse(model, strict=True)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (PostNorm, "its forward does not compute a Mixer block: relative difference"),
        (foreign.DropsInTraining, "does not compute a Mixer block in training"),
        (foreign.DropPathOnce, "does not compute a Mixer block in training"),
        (foreign.Raises, "trying out its forward failed with KeyError"),
        (foreign.Uncopyable, "failed with RuntimeError: one of a kind"),
        (foreign.Unreadable, "attributes cannot be read: OSError"),
        (foreign.LearnedScale, "has parameters or buffers of its own: gain"),
    ],
)
def test_a_forward_that_does_something_else_is_declined(kind: type[nn.Module], reason: str) -> None:
    block = kind()
    row = fastmixer.fuse(block).rows[0]
    assert not row.fused and reason in row.reason and "forward" not in block.__dict__


def test_settings_of_the_instance_are_told_apart() -> None:
    blocks = nn.Sequential(
        foreign.ScaledByAttribute(), foreign.ScaledByAttribute(), foreign.ScaledByAttribute()
    )
    blocks[1].scale = 2.0
    assert [row.fused for row in fastmixer.fuse(blocks)] == [True, False, True]


def kinds_of_hooks(where: object, prefix: str) -> list[str]:
    """The functions of PyTorch's that register hooks of calls."""
    names = [name for name in vars(where) if name.startswith(prefix) and name.endswith("_hook")]
    return [name for name in names if "state_dict" not in name and "registration" not in name]


def _replace(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        block.set_submodule(path, make(block.get_submodule(path)))

    return change


def _subclass_linear(old: nn.Module) -> nn.Module:
    class Adapter(nn.Linear):
        pass

    return Adapter(old.in_features, old.out_features)


def _subclass_parameter(block: nn.Module) -> None:
    class Quantised(nn.Parameter):
        pass

    block.mlp_tokens.fc1.weight = Quantised(block.mlp_tokens.fc1.weight.data)


def _replace_forward(path: str) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        module = block.get_submodule(path)
        module.forward = lambda x: 2 * type(module).forward(module, x)

    return change


def _parametrize(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(block.mlp_channels.fc2)


CHANGES = {
    "another activation": (
        _replace("mlp_tokens.act", lambda old: nn.SiLU()),
        "act is SiLU, not torch.nn.GELU",
    ),
    "linear subclass": (_replace("mlp_tokens.fc1", _subclass_linear), "fc1 is Adapter, not torch.nn.Linear"),
    "norm inside the mlp": (_replace("mlp_channels.norm", lambda old: nn.LayerNorm(48)), "norm is LayerNorm"),
    "another norm": (
        _replace("norm1", lambda old: nn.RMSNorm(DIM)),
        "norm1 is RMSNorm, not torch.nn.LayerNorm",
    ),
    "extra module": (lambda block: block.add_module("extra", nn.Identity()), "a Mixer block lacks: extra"),
    "missing module": (_replace("norm2", lambda old: nn.Identity()), "norm2 is Identity"),
    "pre-hook": (lambda block: block.norm1.register_forward_pre_hook(lambda *args: None), "norm1 has hooks"),
    "hook": (lambda block: block.mlp_tokens.fc1.register_forward_hook(lambda *args: None), "fc1 has hooks"),
    "mlp hook": (lambda block: block.mlp_tokens.register_forward_hook(lambda *args: None), "has hooks"),
    "identity hook": (
        lambda block: block.mlp_tokens.norm.register_forward_hook(lambda *a: None),
        "norm has hooks",
    ),
    "dropout hook": (
        lambda block: block.mlp_tokens.drop1.register_forward_hook(lambda *a: None),
        "drop1 has hooks",
    ),
    "backward hook": (lambda block: block.norm2.register_full_backward_hook(lambda *args: None), "has hooks"),
    "parametrization": (_parametrize, "fc2 is ParametrizedLinear"),
    "pruning": (
        lambda block: nn.utils.prune.l1_unstructured(block.mlp_tokens.fc1, "weight", 0.5),
        "has hooks",
    ),
    "forward replaced": (_replace_forward("mlp_tokens"), "mlp_tokens (Mlp): has had its forward replaced"),
    "layer's forward replaced": (_replace_forward("mlp_tokens.fc1"), "fc1 has had its forward replaced"),
    "parameter subclass": (_subclass_parameter, "weight that is not a plain floating-point Parameter"),
}


@pytest.mark.parametrize("change, reason", CHANGES.values(), ids=CHANGES)
def test_a_changed_block_is_declined_or_runs_its_own_forward(
    change: Callable, reason: str, fused_calls: list
) -> None:
    x = torch.randn(2, SEQ, DIM)
    changed_before = Plain()
    change(changed_before)
    row = fastmixer.fuse(changed_before).rows[0]
    assert not row.fused and reason in row.reason

    block = Plain()
    fastmixer.fuse(block, strict=True)
    block(x)
    assert len(fused_calls) == 1
    change(block)
    with pytest.warns(fastmixer.FallbackWarning) as caught:
        result = block(x)
    assert len(caught) == 1 and reason in str(caught[0].message)
    assert torch.equal(result, Plain.forward(block, x)) and len(fused_calls) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)
    row = fastmixer.fuse(block).rows[0]
    assert not row.fused and reason in row.reason


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("path", ["norm1", "mlp_channels", "mlp_channels.norm"])
@pytest.mark.parametrize("register", kinds_of_hooks(nn.Module, "register_"))
def test_hooks_of_every_kind_inside_are_called(register: str, path: str, fused_calls: list) -> None:
    called: list[nn.Module] = []

    def hook(block: nn.Module) -> None:
        getattr(block.get_submodule(path), register)(lambda module, *_: called.append(module))

    x = torch.randn(2, SEQ, DIM, requires_grad=True)
    hooked_before, hooked_later = Plain(), Plain()
    hook(hooked_before)
    row = fastmixer.fuse(hooked_before).rows[0]
    assert not row.fused and "has hooks" in row.reason

    fastmixer.fuse(hooked_later, strict=True)
    hooked_later(x)
    assert len(fused_calls) == 1
    hook(hooked_later)
    with pytest.warns(fastmixer.FallbackWarning, match="has hooks"):
        hooked_later(x).sum().backward()
    assert called == [hooked_later.get_submodule(path)] and len(fused_calls) == 1


def test_a_change_that_keeps_the_structure_stays_fused(fused_calls: list) -> None:
    block, x = Plain(), torch.randn(2, SEQ, DIM)
    fastmixer.fuse(block, strict=True)
    block(x)
    block.mlp_tokens.fc2 = nn.Linear(12, SEQ)
    block.mlp_channels.act = nn.GELU("tanh")
    block.norm1.eps = 0.1
    assert torch.equal(block(x), Plain.forward(block, x)) and len(fused_calls) == 2
    assert fused_calls[1][1].eps == 0.1 and fused_calls[1][2].approximate == "tanh"


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("register", kinds_of_hooks(nn.modules.module, "register_module_"))
def test_global_hooks_see_the_inner_modules(
    register: str, fused_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)  # PyTorch takes one kind
    block, x = Plain(), torch.randn(2, SEQ, DIM, requires_grad=True)
    fastmixer.fuse(block, strict=True)
    block(x)
    seen = []
    handle = getattr(nn.modules.module, register)(lambda module, *args: seen.append(module))
    try:
        assert "global module hooks" in fastmixer.fuse(Plain()).rows[0].reason
        with pytest.warns(fastmixer.FallbackWarning, match="global module hooks"):
            block(x).sum().backward()
    finally:
        handle.remove()
    assert block.mlp_tokens.fc1 in seen and len(fused_calls) == 1
    block(x)
    assert len(fused_calls) == 2


def test_a_call_with_more_than_x_runs_the_own_forward(fused_calls: list) -> None:
    class Masked(Plain):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    block, x = Masked(), torch.randn(2, SEQ, DIM)
    fastmixer.fuse(block, strict=True)
    assert torch.equal(block(x, mask=torch.zeros(1)), Plain.forward(block, x * 0)) and not fused_calls


def test_an_already_replaced_forward_is_left_alone() -> None:
    block = Plain()
    block.forward = replaced = lambda x: x
    row = fastmixer.fuse(block).rows[0]
    assert not row.fused and "replaced on the instance" in row.reason
    assert block.forward is replaced and fastmixer.unfuse(block) == 0


def test_strict_raises_before_changing_anything() -> None:
    model = nn.Sequential(Plain(), PostNorm(), Plain())
    with pytest.raises(
        ValueError, match=r"1 of 3 blocks .*nothing was changed:\n  1 \(PostNorm\): its forward"
    ):
        fastmixer.fuse(model, strict=True)
    assert all("forward" not in block.__dict__ for block in model)
    with pytest.raises(ValueError, match="no mixer block found in the Linear"):
        fastmixer.fuse(nn.Linear(2, 2), strict=True)
