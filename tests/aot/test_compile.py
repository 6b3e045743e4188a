"""Ahead-of-time compilation: the arithmetic of residency, what is specialised on, and the command itself.

Everything that compiles runs in a subprocess: this process may have TRITON_INTERPRET set.
"""

import json
import os
import subprocess
import sys
import types

import pytest

from fastmixer.aot import report
from fastmixer.aot.catalogue import exception
from fastmixer.configs import TARGETS
from fastmixer.configs.designs import DESIGNS

# --- How many programs fit.


@pytest.mark.parametrize(
    "arch, registers, num_warps, shared, tensor, expected",
    [
        (90, 254, 4, 107 * 1024, 0, 2),  # 256 registers x 128 threads: two programs fill the register file
        (90, 255, 8, 107 * 1024, 0, 1),
        (90, 255, 16, 0, 0, 0),  # 16 warps of 255 registers: not even one
        (90, 168, 4, 0, 0, 3),  # 3 warps of 168 on each scheduler
        (90, 170, 4, 0, 0, 2),  # 170 becomes 176: 2.9 warps a scheduler
        (90, 32, 4, 113 * 1024, 0, 2),  # 113 + 1 KB, twice, is all there is
        (90, 32, 4, 113 * 1024 + 1, 0, 1),
        (90, 16, 4, 0, 0, 16),  # 64 warps
        (90, 16, 1, 0, 0, 32),  # programs
        (86, 16, 4, 0, 0, 12),  # 48 warps
        (86, 32, 4, 99 * 1024, 0, 1),
        (86, 32, 4, 100 * 1024, 0, 0),
        (100, 64, 4, 66648, 256, 2),  # half of the tensor memory each
        (100, 64, 4, 1024, 512, 1),
        ("gfx942", 369, 4, 32768, 0, 1),  # LLVM: "Occupancy: 1"
        ("gfx942", 256, 4, 0, 0, 2),  # "Occupancy: 2"
        ("gfx942", 256, 8, 0, 0, 1),
        ("gfx942", 64, 4, 32768, 0, 2),
        ("gfx942", 64, 4, 0, 0, 8),
    ],
)
def test_programs_per_multiprocessor(arch, registers, num_warps, shared, tensor, expected):
    from fastmixer.aot.compile import programs_per_multiprocessor

    assert programs_per_multiprocessor(arch, registers, num_warps, shared, tensor) == expected


def test_every_target_has_a_multiprocessor_that_holds_a_program_of_its_shared_memory():
    from fastmixer.aot.compile import programs_per_multiprocessor

    for target in TARGETS.values():
        assert programs_per_multiprocessor(target.arch, 32, 4, target.shared_memory) == 1


def test_unknown_arch_is_named():
    from fastmixer.aot.compile import programs_per_multiprocessor

    with pytest.raises(ValueError, match="arch: expected one of .* got 70"):
        programs_per_multiprocessor(70, 32, 4, 0)
    with pytest.raises(ValueError, match="'sm_9'; did you mean sm_90"):
        report.run(["sm_9"])


def test_an_interpreted_kernel_is_refused():
    from fastmixer.aot.compile import compile_launch

    launch = types.SimpleNamespace(kernel=lambda x_ptr: None, grid=(1,), args={}, options={})
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compile_launch(launch, TARGETS["sm_90"])


# --- What a launch is specialised on.

SIGNATURE_PROBE = '''
import json

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime import driver

from fastmixer.aot.compile import code_key, gpu_target, signature
from fastmixer.configs import TARGETS
from fastmixer.ops.launch import Launch


@triton.jit(do_not_specialize=["free"])
def kernel(
    x_ptr, y_ptr, bias_ptr, stride, one, free, big, scale, flag, N, KIND: tl.constexpr, DT: tl.constexpr
):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    x = tl.load(x_ptr + i * stride, mask=i < N, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i)
    if KIND == "double":
        x *= scale + big
    tl.store(y_ptr + i * one, x.to(DT), mask=(i < N) & flag & (free > 0))


class Driver:
    """Just enough of a GPU driver for Triton's JIT to compile, not run, a launch."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.backend

    def get_current_stream(self, device):
        return 0


x = torch.empty(4, 32, dtype=torch.bfloat16, device="meta")
args = dict(
    x_ptr=x, y_ptr=x[1:, 1:], bias_ptr=None, stride=32, one=1, free=16, big=2**40, scale=1.0, flag=True,
    N=100, KIND="double", DT=tl.bfloat16,
)
launch = Launch(kernel, (8,), args, {"num_warps": 4, "enable_fp_fusion": True})
other_values = Launch(kernel, (9,), {**args, "N": 99, "stride": 48}, launch.options)
other_options = Launch(kernel, (8,), args, {"num_warps": 8, "enable_fp_fusion": True})
found = {}
for arch in ("sm_90", "gfx942"):
    target = gpu_target(TARGETS[arch])
    types, constants, attributes = signature(launch, TARGETS[arch])
    compiled = triton.compile(ASTSource(kernel, types, constants, attributes), target, launch.options)
    driver.set_active(Driver(target))
    launched = kernel.run(grid=launch.grid, warmup=True, **args, **launch.options)
    found[arch] = {
        "types": types,
        "constants": {kernel.arg_names[at]: str(value) for (at,), value in constants.items()},
        "attributes": {kernel.arg_names[at]: value for (at,), value in attributes.items() if value},
        "as launched": compiled.hash == launched.hash,
        "codes": len({code_key(one, TARGETS[arch]) for one in (launch, other_values, other_options)}),
    }
print(json.dumps(found))
'''


def _environment():
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def signatures(tmp_path_factory):
    probe = tmp_path_factory.mktemp("signature") / "probe.py"  # a file: Triton reads a kernel's source
    probe.write_text(SIGNATURE_PROBE)
    ran = subprocess.run([sys.executable, probe], capture_output=True, text=True, env=_environment())
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_signature_types_and_constants(signatures):
    for found in signatures.values():
        assert found["types"] == {
            "x_ptr": "*bf16",
            "y_ptr": "*bf16",
            "bias_ptr": "constexpr",
            "stride": "i32",
            "one": "constexpr",
            "free": "i32",
            "big": "i64",
            "scale": "fp32",
            "flag": "u1",
            "N": "i32",
            "KIND": "constexpr",
            "DT": "constexpr",
        }
        assert found["constants"] == {"bias_ptr": "None", "one": "1", "KIND": "double", "DT": "bf16"}


def test_signature_alignment(signatures):
    aligned, within_2gb = ["tt.divisibility", 16], ["tt.pointer_range", 32]
    # y_ptr starts 66 bytes into its storage, "free" is not specialised, and 100 is no multiple of 16.
    assert signatures["sm_90"]["attributes"] == {"x_ptr": [aligned], "stride": [aligned], "big": [aligned]}
    assert signatures["gfx942"]["attributes"] == {
        "x_ptr": [aligned, within_2gb],
        "y_ptr": [within_2gb],
        "stride": [aligned],
        "big": [aligned],
    }


def test_a_launch_compiles_the_very_same_code(signatures):
    assert [found["as launched"] for found in signatures.values()] == [True, True]


def test_launches_share_code_whatever_their_values_but_not_with_other_options(signatures):
    assert [found["codes"] for found in signatures.values()] == [2, 2]


# --- What the command prints and returns, given rows.

GOOD = {
    "arch": "sm_90",
    "multiplies": True,
    "label": "fc1 B/16",
    "ok": True,
    "error": None,
    "triton": "3.6.0",
    "registers": 221,
    "spills": 5,
    "loop_spills": 2,
    "instructions": 2736,
    "loop_instructions": 90,
    "shared_memory": 98304,
    "tensor_memory": 0,
    "programs_per_multiprocessor": 2,
    "hgmma": 8,
    "hmma": 0,
    "imma": 0,
    "dmma": 0,
    "tcgen05": 0,
    "mfma": 0,
    "wgmma": True,
    "full_waits": 4,
    "wgmma_columns": 256,
    "serialised": True,
    "per_element": 14.26,
    "issue_share": None,
    "seconds": 1.0,
}
BAD = {
    "arch": "sm_90",
    "label": "fc2 [B/16]",
    "ok": False,
    "error": "CompilationError: no",
    "seconds": 0.1,
}


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({}, None),
        ({"full_waits": 2}, ""),
        ({"loop_spills": 1}, ""),
        ({"hmma": 1}, ""),
        ({"label": "token_mixing B/16", "full_waits": 3}, None),
        ({"label": "layer_norm_fwd B/16", "multiplies": False, "hgmma": 0}, None),
    ],
    ids=str,
)
def test_what_is_not_on_wgmma_or_not_clean_is_an_exception(changed, reason):
    clean = GOOD | {"loop_spills": 0, "serialised": False, "full_waits": 1}
    assert exception("fc1 B/16", clean | {"serialised": True}) == ""
    row = clean | changed
    assert exception(row["label"], row) == reason


@pytest.mark.parametrize("rows, code", [([GOOD], 0), ([GOOD, BAD], 1)])
def test_json_and_exit_code(monkeypatch, capsys, rows, code):
    monkeypatch.setattr(report, "compile_catalogue", lambda archs, jobs: rows)
    assert report.run(["sm_90"], as_json=True) == code
    assert json.loads(capsys.readouterr().out) == {"ok": code == 0, "rows": rows}


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(report, "compile_catalogue", lambda archs, jobs: [GOOD, BAD])
    assert report.run(["sm_90"]) == 1
    out = capsys.readouterr().out
    good = next(line for line in out.splitlines() if "fc1 B/16" in line)
    assert good.split()[2:] == [
        "221", "5", "2", "96.0", "2", "8", "HGMMA", "serialised", "4", "14.3", "-", "ok"
    ]  # fmt: skip
    assert "fc2 [B/16]:\nCompilationError: no" in out
    assert "fc1 B/16:\nno reason known" in out
    assert any(line.split()[:2] == ["fc2", "[B/16]"] for line in out.splitlines())
    assert "1 of 2 compile and fit" in out


def test_without_rich_only_json(monkeypatch, capsys):
    monkeypatch.setattr(report, "compile_catalogue", lambda archs, jobs: [GOOD])
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(RuntimeError, match=r"fastmixer\[demo\]"):
        report.run(["sm_90"])
    assert report.run(["sm_90"], as_json=True) == 0


# --- The command, over the whole catalogue.

MATRIX_UNITS = {"sm_90": "hgmma", "sm_100": "tcgen05", "gfx942": "mfma"}  # the others: mma.sync, HMMA


@pytest.mark.slow
def test_the_catalogue_compiles_fits_and_uses_matrix_units(drawn_arch):
    """``python -m fastmixer compile --json``, run where the interpreter is on: minutes an arch."""
    arch = drawn_arch
    ran = subprocess.run(
        [sys.executable, "-m", "fastmixer", "compile", "--arch", arch, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert ran.stdout, ran.stderr
    rows = json.loads(ran.stdout)["rows"]
    assert {row["label"]: row["error"] for row in rows if not row["ok"]} == {}
    assert ran.returncode == 0
    for row in rows:
        assert row["arch"] == arch
        assert row["shared_memory"] <= row["shared_memory_limit"] == TARGETS[arch].shared_memory
        assert row["programs_per_multiprocessor"] >= 1
        assert 0 < row["registers"] <= (512 if arch == "gfx942" else 255)
    in_16_bit = [row for row in rows if row["multiplies"] and "float16" in row["label"]]
    assert {row["label"] for row in in_16_bit if not row[MATRIX_UNITS.get(arch, "hmma")]} == set()
    if arch == "sm_90":
        unexplained = {row["label"] for row in rows if exception(row["label"], row) == ""}
        assert unexplained == set()
        for model in ("B/16", "S/16"):
            check_hopper_defaults(rows, model)
        check_around_the_loops(rows)
        check_designs(rows)


# Instructions of a warp outside the loop over products, and in it for 64 hidden units (token_wgrad: a step),
# before all of a program's sizes were constants: commit ee63e61 with Triton 3.6.0, and with 3.9.0.
BEFORE = {
    "token_mixing B/16": ((3515, 515), (3735, 573)),
    "token_mixing B/32": ((1198, 438), (1218, 462)),
    "token_mixing H/14": ((3914, 666), (3998, 728)),
    "token_dgrad B/16": ((756, 952), (716, 1110)),
    "token_dgrad B/32": ((304, 554), (284, 584)),
    "token_dgrad H/14": ((728, 932), (742, 1210)),
    "token_wgrad of dw1 B/16": ((1068, 524), (1021, 573)),
    "token_wgrad of dw2 B/16": ((1001, 364), (996, 412)),
    "token_wgrad B/32": ((640, 676), (627, 711)),
    "token_wgrad of dw1 H/14": ((857, 486), (939, 641)),
    "token_wgrad of dw2 H/14": ((855, 397), (865, 422)),
}


def check_around_the_loops(rows):
    """One-pass token mixing works in its loops: much of what it did before and behind them is gone."""
    rows = {row["label"].removesuffix(" bfloat16"): row for row in rows if row["label"].endswith(" bfloat16")}
    for label, before in BEFORE.items():
        row = rows[label]
        outside, loop = before[not row["triton"].startswith("3.6.")]
        steps = 2 if "dgrad" in label and "B/32" not in label else 1  # of 32 hidden units
        assert row["loop_instructions"] * steps <= loop, label
        most = 0.75 if "grad" in label else 0.65 if "H/14" in label else 0.6
        assert row["instructions"] - row["loop_instructions"] <= most * outside, label
        assert (row["loop_spills"], row["serialised"]) == (0, False), label


def check_designs(rows):
    """Each design of a product on Hopper: clean, with wgmma as wide as it says."""
    names = {design.name for designs in DESIGNS.values() for design in designs if 90 in design.archs}
    rows = {row["label"]: row for row in rows if row["label"].split()[-1] in names}
    # Of the channel half in bf16 and fp16, fc1 twice, fc2 and the backward by five designs each, the backward
    # that recomputes p by two; of long sequences fc2 by four, that backward by two.
    assert len(rows) == 2 * (4 * 5 + 2) + 4 + 2
    for label, row in rows.items():
        columns = int(label.split()[-1].split("_")[1].split("x")[1])
        assert row["wgmma_columns"] == columns, label
        assert (row["loop_spills"], row["serialised"], row["hmma"]) == (0, False, 0), label
        assert row["full_waits"] <= 1, label


def check_hopper_defaults(rows, model):
    """wgmma for every product, none waiting for the one before it, no spill in a loop, GELU's work hidden.

    triton 3.6 spills nothing at all but in the epilogue that stores the pre-activation too; newer ones may
    spill around the loops, in 2% of the instructions.
    """
    rows = [row for row in rows if row["label"].endswith(f" {model} bfloat16")]
    with_products = [row for row in rows if row["multiplies"]]
    assert {row["label"].split()[0] for row in with_products} == {
        "token_mixing", "token_dgrad", "token_wgrad",
        "fc1", "fc2", "mlp_hidden_bwd",
    }  # fmt: skip
    assert {row["label"] for row in rows if row["loop_spills"] or exception(row["label"], row)} == set()
    assert {row["label"] for row in with_products if not row["hgmma"]} == set()
    assert {row["label"]: row["hmma"] for row in rows if row["hmma"]} == {}
    assert {row["label"] for row in rows if row["serialised"]} == set()
    stores_both = [row for row in rows if "storing p" in row["label"]]
    for row in rows:
        oldest = row["triton"].startswith("3.6.") and row not in stores_both
        assert row["spills"] <= (0 if oldest else row["instructions"] / 50), row["label"]
    figures = {row["label"].split()[0]: row for row in rows if row not in stores_both}
    assert 0 < figures["fc1"]["per_element"] <= 16
    assert 0 < figures["token_mixing"]["per_element"] <= 20
    assert 0 < figures["token_mixing"]["issue_share"] < 0.8
