"""A fused block is called, copied, wrapped and exported like the block that it is."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import typing
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from foreign_blocks import DIM, SEQ, Plain, make_model
from foreign_families import FAMILIES
from torch import Tensor, nn

import fastmixer


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


class Documented(Plain):
    skip = False

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """What it does to hidden_states."""
        if self.skip:
            return hidden_states
        return super().forward(hidden_states if mask is None else hidden_states * mask)


def fused(kind: Callable[[], nn.Module] = Documented) -> nn.Module:
    block = kind().eval()
    fastmixer.fuse(block, strict=True)
    return block


def tokens() -> Tensor:
    return torch.randn(2, SEQ, DIM)


# ---- calls -------------------------------------------------------------------------------------------------


def test_name_signature_and_docstring_are_the_originals() -> None:
    plain, block = Documented(), fused()
    assert inspect.signature(block.forward) == inspect.signature(plain.forward)
    assert list(inspect.signature(block.forward).parameters) == ["hidden_states", "mask"]
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        assert getattr(block.forward, name) == getattr(plain.forward, name), name
    assert inspect.getsource(block.forward) == inspect.getsource(plain.forward)
    assert inspect.getdoc(block.forward) == "What it does to hidden_states."
    assert typing.get_type_hints(block.forward).keys() == {"hidden_states", "mask", "return"}
    assert inspect.signature(fused(FAMILIES["lucidrains"].block).forward).parameters.keys() == {"input"}


def test_x_may_be_passed_by_its_name(fused_calls: list) -> None:
    x = tokens()
    block, other = fused(), fused(FAMILIES["lucidrains"].block)
    assert torch.equal(block(hidden_states=x), block(x)) and len(fused_calls) == 2
    other(input=FAMILIES["lucidrains"].x())
    assert len(fused_calls) == 3
    for call in (lambda: block(x=x), lambda: block(), lambda: block(x, x, x)):
        with pytest.raises(TypeError, match=r"forward\(\)"):
            call()
    assert torch.equal(block(hidden_states=x, mask=torch.zeros(1)), block(x * 0))


def test_a_compiled_call_by_name_is_one_graph() -> None:
    torch.compiler.reset()
    block, x = fused(), tokens()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(hidden_states=x), block(x))
    torch.compiler.reset()


def test_a_forward_outlives_its_block_as_a_bound_method_does(fused_calls: list) -> None:
    """As where a function makes a block and returns ``block.forward``."""
    block, x = fused(), tokens()
    expected, forward = block(x), block.forward
    inside = weakref.ref(block.mlp_tokens)
    del block
    assert torch.equal(forward(x), expected) and len(fused_calls) == 2
    assert torch.equal(forward(hidden_states=x), expected)
    assert torch.equal(forward(x, mask=torch.zeros(1)), forward(x * 0))
    fused_calls.clear()
    gc.disable()
    try:
        del forward
        assert inside() is None
    finally:
        gc.enable()


def test_a_forward_that_outlives_its_block_knows_what_was_set_and_copied() -> None:
    block, x = fused(), tokens()
    expected = block(x)
    other = copy.copy(block)
    other(x)
    forward = other.forward
    del other, block
    assert torch.equal(forward(x), expected)
    block = fused()
    block.layer_idx = 3
    block(x)
    forward = block.forward
    del block
    assert forward(x).shape == x.shape and forward.block.layer_idx == 3
    forward = copy.copy(fused()).forward
    with pytest.raises(ReferenceError, match="no longer exists, and was never run"):
        forward(x)


def test_a_forward_wrapped_by_the_user(fused_calls: list) -> None:
    """As by ``accelerate``, Liger or a decorator that times calls."""
    block, x, seen = fused(), tokens(), []
    expected, inner = block(x), block.forward

    @functools.wraps(inner)
    def timed(*args: object, **kwargs: object) -> Tensor:
        seen.append(args)
        return inner(*args, **kwargs)

    block.forward = timed
    assert inspect.signature(block.forward) == inspect.signature(Documented().forward)
    assert torch.equal(block(x), expected) and len(fused_calls) == 2 and len(seen) == 1
    assert fastmixer.fuse(block).rows[0].reason == "already fused"
    assert fastmixer.unfuse(block) == 1
    assert torch.equal(block(x), expected) and len(fused_calls) == 2 and len(seen) == 2
    assert fastmixer.unfuse(block) == 0
    row = fastmixer.fuse(block).rows[0]
    assert not row.fused and row.reason == "its forward has been replaced on the instance"


def test_a_forward_kept_in_the_block_by_who_patches_it(fused_calls: list) -> None:
    """As by accelerate's mixed precision, under one name, and by users under any."""
    for name in ("_original_forward", "_mine"):
        block, x = fused(), tokens()
        expected = block(x)
        setattr(block, name, block.forward)
        block.forward = lambda x, block=block, name=name: 2 * getattr(block, name)(x)
        fused_calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            assert torch.equal(block(x), 2 * expected) and len(fused_calls) == 1
            patch.setattr("fastmixer.blocks.fused_forward.match", None)  # it has settled
            assert torch.equal(block(x), 2 * expected)
        assert torch.equal(copy.deepcopy(block)(x), 2 * expected)
        assert fastmixer.unfuse(block) == 1 and torch.equal(block(x), 2 * expected)
        assert len(fused_calls) == 3


# ---- copies ------------------------------------------------------------------------------------------------


def pickled(block: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(block))


def saved_and_loaded(block: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled, saved_and_loaded])
def test_a_copy_is_fused_and_a_block_of_its_own(duplicate: Callable, fused_calls: list) -> None:
    block, x = fused(), tokens()
    expected = block(x)
    other = duplicate(block)
    assert other.forward is not block.forward and other.__dict__.keys() == block.__dict__.keys()
    assert torch.equal(other(x), expected) and len(fused_calls) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmixer.FallbackWarning)
        other.skip = True
        assert torch.equal(other(x), x) and torch.equal(block(x), expected)
        other.skip, block.skip = False, True
        assert torch.equal(other(x), expected) and torch.equal(block(x), x)
    assert fastmixer.unfuse(block) == 1 and len(fused_calls) == 4
    del block
    assert torch.equal(other(x), expected) and len(fused_calls) == 5
    assert fastmixer.unfuse(other) == 1 and "forward" not in other.__dict__


def test_a_shallow_copy_shares_the_weights() -> None:
    """As where layers share their weights and differ in an index."""
    block, x = fused(), tokens()
    other = copy.copy(block)
    other.layer_idx = 1
    nn.init.zeros_(block.mlp_channels.fc2.weight)
    assert torch.equal(other(x), block(x)) and not hasattr(block, "layer_idx")
    assert list(other.parameters())[0] is list(block.parameters())[0]


def test_a_shallow_copy_of_a_model_and_of_a_copy() -> None:
    model, x = make_model().eval(), torch.randn(2, 3, 16, 16)
    fastmixer.fuse(model, strict=True)
    assert torch.equal(copy.copy(model)(x), model(x))
    block, x = fused(), tokens()
    expected = block(x)
    for _ in range(3):
        block = copy.copy(copy.deepcopy(block))
    assert block.forward.block is block and torch.equal(block(x), expected)


def test_a_copys_warning_has_the_name_of_the_block() -> None:
    model = nn.Sequential(Documented())
    fastmixer.fuse(model, strict=True)
    other = copy.deepcopy(model)
    other[0].mlp_tokens.act = nn.SiLU()
    with pytest.warns(fastmixer.FallbackWarning, match=r"^0 \(Documented\) runs unfused: mlp_tokens"):
        other(tokens())


class KeepsState(Documented):
    """With a say in what is pickled."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "stored": True}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_a_state_of_the_classs_own_is_kept(duplicate: Callable, fused_calls: list) -> None:
    block, x = fused(KeepsState), tokens()
    other = duplicate(block)
    assert other.stored and torch.equal(other(x), block(x)) and len(fused_calls) == 2


# ---- accelerate --------------------------------------------------------------------------------------------


class Doubling:
    """A hook of accelerate's, to be mixed into its class."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


@pytest.fixture
def hooks() -> object:
    return pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")


@pytest.mark.parametrize("remove_first", [False, True])
def test_accelerates_hooks(remove_first: bool, hooks: object, fused_calls: list) -> None:
    block, x = fused(), tokens()
    expected = block(x)
    hook = type("Hook", (Doubling, hooks.ModelHook), {})()
    hooks.add_hook_to_module(block, hook)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(block(x), 2 * expected) and len(fused_calls) == 2
        hooks.add_hook_to_module(block, hooks.ModelHook(), append=True)
        assert torch.equal(copy.deepcopy(block)(x), 2 * expected) and len(fused_calls) == 3
    if remove_first:
        hooks.remove_hook_from_module(block)
        assert torch.equal(block(x), expected) and len(fused_calls) == 4
        assert fastmixer.unfuse(block) == 1 and "forward" not in block.__dict__
    else:
        assert fastmixer.unfuse(block) == 1
        assert torch.equal(block(x), 2 * expected), "the hook stays"
        hooks.remove_hook_from_module(block)
    fused_calls.clear()
    assert torch.equal(block(x), expected) and not fused_calls
    assert fastmixer.fuse(block, strict=True).rows[0].reason == ""
    assert torch.equal(block(x), expected) and len(fused_calls) == 1
    assert fastmixer.unfuse(block) == 1 and "forward" not in block.__dict__


def test_accelerates_hooks_on_every_module(hooks: object, fused_calls: list) -> None:
    """As by ``cpu_offload`` and ``dispatch_model``: those inside have to run."""
    model, x = nn.Sequential(Documented()).eval(), tokens()
    expected = model(x)
    fastmixer.fuse(model, strict=True)
    hooks.attach_align_device_hook(model, execution_device=torch.device("cpu"))
    with pytest.warns(fastmixer.FallbackWarning, match=r"^0 \(Documented\) runs unfused: .*forward replaced"):
        assert torch.equal(model(x), expected)
    hooks.remove_hook_from_submodules(model)
    assert fastmixer.unfuse(model) == 1 and not fused_calls
    assert torch.equal(model(x), expected)


# ---- export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes_by_name(strict: bool) -> None:
    block, x = fused(Plain), tokens()
    shapes = {"x": {0: torch.export.Dim("n", min=1, max=64)}}
    program = torch.export.export(block, (x,), dynamic_shapes=shapes, strict=strict)
    other = torch.randn(5, SEQ, DIM)
    torch.testing.assert_close(program.module()(other), block(other))
    program = torch.export.export(block, (), {"x": x}, dynamic_shapes=shapes, strict=strict)
    torch.testing.assert_close(program.module()(x=other), block(other))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_script_names_the_remedy(whole: bool) -> None:
    model = make_model().eval() if whole else Plain()
    fastmixer.fuse(model, strict=True)
    with pytest.raises(AttributeError, match=r"fused block: call fastmixer\.unfuse on the model before"):
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore")
def test_trace_runs_the_block_without_a_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = fused(Plain), tokens()
    monkeypatch.setattr("fastmixer.blocks.fused_forward.match", None)
    traced = torch.jit.trace(block, x, check_trace=False)
    assert torch.equal(traced(x), Plain.forward(block, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_an_onnx_program_is_made_of_pytorchs_operators(dynamo: bool) -> None:
    pytest.importorskip("onnxscript" if dynamo else "onnx", reason="not installed")
    block, x, file = fused(Plain), tokens(), io.BytesIO()
    with fastmixer.backend("auto"):
        torch.onnx.export(block, (x,), file, dynamo=dynamo)
    assert file.tell() > 0 and b"fastmixer" not in file.getvalue()


@pytest.mark.parametrize("strict", [False, True])
def test_what_onnx_exports_has_no_operator_of_ours(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first step, which needs no other package."""
    import torch.onnx._internal.exporter

    block, x = fused(Plain), tokens()
    for exporting in (False, True):
        monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda exporting=exporting: exporting)
        with fastmixer.backend("triton"):
            program = torch.export.export(block, (x,), strict=strict)
        ours = [node for node in program.graph.nodes if "fastmixer" in str(node.target)]
        assert bool(ours) != exporting
        torch.compiler.reset()
