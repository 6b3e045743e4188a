"""What a user meets on a fresh machine: no GPU, perhaps no triton and no timm, and a cheap import.

Each test starts a Python of its own, because what it checks happens once a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from hidden_packages import HIDE

INPUTS = """
import torch, fastmixer
from fastmixer import functional, reference
torch.manual_seed(0)

def half(width, channels=4):
    shapes = (channels,), (channels,), (3, width), (3,), (width, 3), (width,)
    return fastmixer.MixingParams(*(torch.randn(shape) for shape in shapes))

x, token, channel = torch.randn(2, 5, 4), half(5), half(4)
expected = reference.mixer_block(x, token, channel)
"""


def python(code: str, *flags: str, **environment: str) -> str:
    """What ``code`` prints in a Python of its own, without a GPU and without this run's settings."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TRITON_", "FASTMIXER_BACKEND", "FASTMIXER_MEMORY"))
    }
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_cheap_and_imports_nothing_that_torch_does_not() -> None:
    """Under 150 ms of processor time beyond ``import torch``, the best of three, each from scratch."""
    report = json.loads(
        python(
            """
            import json, sys, time
            import torch
            before = set(sys.modules)
            costs = []
            for _ in range(3):
                for name in set(sys.modules) - before:
                    del sys.modules[name]
                start = time.process_time()
                import fastmixer
                costs.append(time.process_time() - start)
            print(json.dumps({
                "cost": min(costs),
                "new": sorted(n for n in set(sys.modules) - before if not n.startswith("fastmixer")),
                "public": [name for name in fastmixer.__all__ if getattr(fastmixer, name) is None],
                "heavy": sorted({"triton", "timm", "sklearn", "rich", "torch._dynamo", "torch._inductor"}
                                & set(sys.modules) - before),
                "cuda": torch.cuda.is_initialized(),
            }))
            """
        )
    )
    assert report["cost"] < 0.150
    assert report["new"] == []
    # All public names were touched by now: these import no more than they need either.
    assert report["public"] == [] and report["heavy"] == [] and not report["cuda"]


def test_importing_gives_no_warning() -> None:
    """Every module but those that import triton or are programs, with all warnings as errors."""
    python(
        """
        import fastmixer, fastmixer.functional, fastmixer.reference, fastmixer.blocks.model
        import fastmixer.blocks.surgery, fastmixer.checkpoint.load, fastmixer.dispatch, fastmixer.ops.launch
        import fastmixer.aot.catalogue, fastmixer.verify.run, fastmixer.info, fastmixer.cli
        """,
        "-W",
        "error",
    )


def test_without_triton() -> None:
    python(
        HIDE
        + 'hide("triton")\n'
        + INPUTS
        + textwrap.dedent(
            """
            import warnings
            for name in fastmixer.__all__:
                getattr(fastmixer, name)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert torch.equal(functional.mixer_block(x, token, channel), expected)
                on_meta = [type(h)(*(t.to("meta") for t in h[:6])) for h in (token, channel)]
                assert functional.mixer_block(x.to("meta"), *on_meta).shape == x.shape
            messages = [str(w.message) for w in caught if w.category is fastmixer.FallbackWarning]
            assert messages[0].startswith("fastmixer runs the PyTorch reference: "), messages
            assert any("triton is not installed" in message for message in messages), messages
            with fastmixer.backend("triton"):
                try:
                    functional.mixer_block(x, token, channel)
                except RuntimeError as error:
                    assert "triton is not installed" in str(error), error
                else:
                    raise SystemExit("nothing was raised")
            with fastmixer.backend("torch"):
                block = fastmixer.MixerBlock(4, 5).eval()
                assert torch.equal(block(x), block.forward_modules(x))
            """
        )
    )


def test_without_timm() -> None:
    """And without the other packages of the extras."""
    python(
        HIDE
        + 'hide("timm", "sklearn", "PIL", "rich", "safetensors", "hypothesis", "scipy")\n'
        + INPUTS
        + textwrap.dedent(
            """
            from torch import nn
            model = nn.Sequential(*(fastmixer.MixerBlock(4, 5) for _ in range(2))).eval()
            with fastmixer.backend("torch"), torch.no_grad():
                before = model(x)
                report = fastmixer.fuse(model, strict=True)
                assert len(report.fused) == 2 and "2 of 2 blocks fused" in str(report), report
                assert torch.equal(model(x), before)
                fastmixer.unfuse(model)
            with torch.device("meta"):
                made = fastmixer.create_model("mixer_s32_224")
            assert sum(p.numel() for p in made.parameters()) > 18e6
            fastmixer.load_checkpoint
            """
        )
    )


def test_choosing_for_a_gpu_and_recording_import_nothing_that_may_be_missing(tmp_path: Path) -> None:
    """The first fused call on a GPU chooses: it needs what torch needs. filelock is one of torch's."""
    python(
        """
        import sys
        import torch
        before = set(sys.modules)
        from fastmixer import configs
        from fastmixer.configs import tables
        problem = configs.Problem(8, 196, 768, 384, torch.bfloat16, torch.bfloat16)
        gpu = configs.DEVICES["nvidia-h200"].target
        tiles = configs.choose("token_mixing", problem, gpu)
        tables.record(gpu.name, tables.Entry("token_mixing", problem, tiles))
        assert tables.read("user", gpu.name).entries
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert new <= {*sys.stdlib_module_names, "fastmixer", "filelock"}, new
        """,
        FASTMIXER_CACHE_DIR="",
        XDG_CACHE_HOME=str(tmp_path),
    )


def test_interpreter_asked_for_too_late() -> None:
    """Kernels are already made for a GPU by then: the error says so, and what to do."""
    python(
        "import fastmixer.kernels.mlp, os\n"
        + 'os.environ["TRITON_INTERPRET"] = "1"\n'
        + INPUTS
        + textwrap.dedent(
            """
            with fastmixer.backend("triton"):
                try:
                    functional.mixer_block(x, token, channel)
                except RuntimeError as error:
                    message = str(error)
                else:
                    raise SystemExit("nothing was raised")
            assert "TRITON_INTERPRET was set after triton was imported" in message, message
            assert "before Python starts" in message, message
            """
        )
    )


def test_on_a_cpu_without_the_interpreter() -> None:
    """The plain first use: auto runs the reference and says so once; "triton" says how it could run."""
    python(
        INPUTS
        + textwrap.dedent(
            """
            import sys, warnings
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    assert torch.equal(functional.mixer_block(x, token, channel), expected)
            assert [w.category for w in caught] == [fastmixer.FallbackWarning], caught
            assert "x is on the CPU" in str(caught[0].message) and "triton" not in sys.modules
            with fastmixer.backend("triton"):
                try:
                    functional.mixer_block(x, token, channel)
                except RuntimeError as error:
                    assert "set TRITON_INTERPRET=1 before Python starts" in str(error), error
                else:
                    raise SystemExit("nothing was raised")
            assert not torch.cuda.is_initialized()
            """
        )
    )


def test_the_environment_alone_runs_the_kernels_interpreted() -> None:
    python(
        INPUTS
        + textwrap.dedent(
            """
            from fastmixer import parity
            from fastmixer.ops import launch
            kernels = []
            original = launch.Launch
            launch.Launch = lambda *args: (kernels.append(args[0]), original(*args))[1]
            result = functional.mixer_block(x, token, channel)
            names = ("row_moments", "token_mixing", "fc1", "fc2")
            assert all(getattr(launch.kernels(), name) in kernels for name in names), kernels
            doubled = [type(h)(*(t.double() for t in h[:6])) for h in (token, channel)]
            verdict = parity.compare(result, expected, reference.mixer_block(x.double(), *doubled))
            assert verdict.ok, verdict
            """
        ),
        TRITON_INTERPRET="1",
        FASTMIXER_BACKEND="triton",
    )
