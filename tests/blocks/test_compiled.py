"""Fused models under torch.compile and torch.export: whole graphs, the ordinary call's bits, what changes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import fastmixer

SIZES = {"num_classes": 10, "img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 40}
MODELS = {"timm": timm.models.mlp_mixer.MlpMixer, "fastmixer": fastmixer.MlpMixer}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with fastmixer.backend("triton"):
        yield
    torch.compiler.reset()


def mixer(kind: str = "timm", device: torch.device | str = "cpu", **kwargs: object) -> nn.Module:
    """A fused model with parameters that are all random."""
    torch.manual_seed(0)
    model = MODELS[kind](**{**SIZES, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model = model.to(device)
    fastmixer.fuse(model, strict=True)
    return model


def images(batch: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)).to(device)


def step(model: nn.Module, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The logits, and the gradients of x and of the parameters."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), [leaf, *parameters])]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_compiled_model_is_one_graph_with_the_ordinary_bits(
    kind: str, device: torch.device, launched: list
) -> None:
    """Forward and backward; a second batch size costs one more graph, a third none."""
    model = mixer(kind, device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    for batch, count in ((2, 1), (3, 2), (5, 2)):
        found = step(compiled, images(batch, device), parameters)
        assert graphs() == count
        assert {"token_mixing", "fc1", "token_dgrad", "mlp_hidden_bwd"} < set(launched)
        launched.clear()
        expected = step(model, images(batch, device), parameters)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_inference_launches_what_an_ordinary_call_launches(
    device: torch.device, launched: list
) -> None:
    model = mixer(device=device).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(2, device)
    with torch.no_grad():
        expected = model(x)
        launched.clear()
        model(x)
        ordinary = list(launched)
        compiled(x)
        launched.clear()
        assert torch.equal(compiled(x), expected)
    assert launched == ordinary and ordinary.count("pack_weights") == len(model.blocks)


def test_a_symbolic_batch_from_the_start(device: torch.device) -> None:
    model = mixer(device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 7):
            assert torch.equal(compiled(images(batch, device)), model(images(batch, device)))
        assert graphs() == 1
        assert torch.equal(compiled(images(1, device)), model(images(1, device))) and graphs() <= 2


def test_blocks_that_were_never_called_before(device: torch.device) -> None:
    """A block finds its structure at its first call, which a trace must not record."""
    torch.manual_seed(0)
    model = fastmixer.MlpMixer(**SIZES).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images(2, device)), model(images(2, device)))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(autocast: torch.dtype, device: torch.device) -> None:
    """Of the blocks alone: around them the compiler rounds where it likes."""
    blocks = mixer(device=device).blocks
    compiled = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    parameters = list(blocks.parameters())
    x = torch.randn(2, 16, SIZES["embed_dim"], device=device)
    g = torch.randn_like(x)
    results = []
    for model in (compiled, blocks):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, autocast):
            y = model(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, *parameters], g)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        assert not torch.equal(results[0][0], blocks(x))  # which is fp32


def test_lean_memory_and_frozen_parameters(device: torch.device, launched: list) -> None:
    model = mixer(device=device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp_channels.fc1" in name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with fastmixer.memory("lean"):
        found = step(compiled, images(2, device), parameters)
        expected = step(model, images(2, device), parameters)
    assert "token_wgrad" not in launched
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_drop_path_draws_what_an_ordinary_call_draws(device: torch.device) -> None:
    model = mixer(device=device, drop_path_rate=0.5).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    torch.manual_seed(7)
    found = step(compiled, images(4, device), parameters)
    torch.manual_seed(7)
    expected = step(model, images(4, device), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_step_of_an_optimizer_is_seen(device: torch.device) -> None:
    model = mixer(device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = images(2, device)
    with torch.no_grad():
        before = compiled(x)
    compiled(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = compiled(x)
        assert torch.equal(after, model(x)) and not torch.equal(after, before)


def test_what_changes_inside_a_block_is_noticed(device: torch.device) -> None:
    model = mixer(device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(2, device)
    with torch.no_grad():
        before = compiled(x)
        mlp = model.blocks[0].mlp_tokens
        mlp.fc1 = nn.Linear(mlp.fc1.in_features, mlp.fc1.out_features, device=device)
        after = compiled(x)
        assert torch.equal(after, model(x)) and not torch.equal(after, before)
        model.blocks[1].mlp_channels.act = nn.ReLU()
        with pytest.warns(fastmixer.FallbackWarning, match="runs unfused"):
            after = compiled(x)
        torch.testing.assert_close(after, model(x))


def test_a_block_compiled_by_itself_is_compiled_once_for_all(device: torch.device) -> None:
    """Regional compilation: blocks of one kind share the code, though each has its own packed weights."""
    model = mixer(device=device, num_blocks=5)
    x = images(2, device)
    with torch.no_grad():
        expected = model(x)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        assert torch.equal(model(x), expected)
    assert graphs() <= 2


@pytest.mark.filterwarnings("ignore::fastmixer.FallbackWarning")
def test_the_other_backends_compile_the_reference(launched: list) -> None:
    model = mixer()
    for name in ("auto", "torch"):
        torch.compiler.reset()
        with fastmixer.backend(name), torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(images(2)), model(images(2)))
    assert not launched


@pytest.mark.slow
def test_inductor(device: torch.device) -> None:
    """The default backend. What is not the block is its own code, and rounds in its own way."""
    model = mixer(device=device)
    compiled = torch.compile(model, fullgraph=True)
    parameters = list(model.parameters())
    for batch in (2, 3):
        found = step(compiled, images(batch, device), parameters)
        expected = step(model, images(batch, device), parameters)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_an_exported_program_runs_and_is_saved(
    strict: bool, trains: bool, tmp_path: Path, device: torch.device, launched: list
) -> None:
    model = mixer(device=device).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.set_grad_enabled(trains):
        program = torch.export.export(
            model, (images(2, device),), dynamic_shapes=({0: batch},), strict=strict
        )
    targets = {node.target for node in program.graph.nodes}
    operators = torch.ops.fastmixer
    assert (operators.mixing_training if trains else operators.mixing).default in targets
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    launched.clear()
    with torch.no_grad():
        for size in (1, 2, 5):
            assert torch.equal(loaded(images(size, device)), model(images(size, device)))
    assert "token_mixing" in launched
    if trains:
        logits = loaded(images(2, device))
        logits.square().sum().backward()
        expected = step(model, images(2, device), list(model.parameters()))[2:]
        found = dict(loaded.named_parameters())
        for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name].grad, gradient)


def test_an_exported_program_keeps_no_pre_activation() -> None:
    """It is for inference, most of the time; gradients recompute."""
    program = torch.export.export(mixer().eval(), (images(2),))
    calls = [n for n in program.graph.nodes if n.target is torch.ops.fastmixer.mixing_training.default]
    assert len(calls) == SIZES["num_blocks"]
    assert all(node.args[-1] is True for node in calls), "lean"


def test_a_program_is_loaded_where_only_the_operators_are_known(tmp_path: Path) -> None:
    model = mixer().eval()
    path, x = tmp_path / "mixer.pt2", images(2)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), path)
        torch.save((x, model(x)), tmp_path / "expected.pt")
    code = """
        import sys, torch, fastmixer.ops.torch_ops
        loaded = torch.export.load("mixer.pt2").module()
        x, expected = torch.load("expected.pt")
        with torch.no_grad():
            assert torch.equal(loaded(x), expected)
        assert "fastmixer.blocks.block" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::fastmixer.FallbackWarning")
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_the_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "compile.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with fastmixer.backend(name):
        for snippet in snippets:
            exec(compile(snippet, "compile.md", "exec"), names)
    found = {str(node.target) for node in names["program"].graph.nodes if "fastmixer" in str(node.target)}
    assert found == ({"fastmixer.mixing.default"} if name == "triton" else set())


def test_ordinary_calls_do_not_pass_through_the_dispatcher() -> None:
    """Its cost, tens of microseconds a call, is a trace's alone."""
    model = mixer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, images(2), list(model.parameters()))
        with torch.no_grad():
            model(images(2))
    called = {event.name for event in profile.events()}
    assert "Mixing" in called and not [name for name in called if name.startswith("fastmixer::")]
