"""Ahead-of-time compilation: the reading of assembly, the arithmetic of residency, and the command itself.

Everything that compiles runs in a subprocess: this process may have TRITON_INTERPRET set.
"""

import json
import os
import subprocess
import sys
import types

import pytest

from fastmixer import compile_report
from fastmixer.configs import TARGETS
from fastmixer.sass import count_amdgcn, count_sass, in_loop, parse_sass

# --- Reading assembly. The snippets are lines from nvdisasm 12.9 / 13.x and LLVM, instructions left out.

SPILLS_IN_A_LOOP = """\
tok:
.text.tok:
        /*0590*/                   STL.64 [R1+0x88], R12 ;
        /*4fc0*/              @!P5 BRA `(.L_x_0) ;
.L_x_2:
        /*55f0*/                   DEPBAR.LE SB0, 0x0 ;
        /*5a90*/                   LDL R164, [R1+0x1c] ;
        /*5b00*/                   HMMA.16816.F32.BF16 R28, R4, R18, R28 ;
        /*6fd0*/              @!P5 CALL.REL.NOINC `(.L_x_1) ;
        /*6fe0*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*7000*/                   BRA `(.L_x_3) ;
.L_x_0:
        /*7230*/                   STL [R1+0x24], R2 ;
.L_x_3:
        /*7410*/                   LDL.LU R33, [R1+0x90] ;
        /*e520*/                   EXIT ;
.L_x_4:
        /*e860*/                   BRA `(.L_x_4);
        /*e870*/                   NOP;
.L_x_5:
"""

# sm_100 lays the waits for a barrier out behind the kernel; they branch back without being a loop.
WAITS_OUT_OF_LINE = """\
        /*0010*/                   STL [R1], R2 ;
        /*6850*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR63], tmem[UR6], idesc[UR7], !UPT ;
        /*6860*/                   UTCHMMA tmem[UR66], gdesc[UR10], tmem[UR61], tmem[UR12], idesc[UR13], UPT ;
        /*6870*/                   UTCBAR [UR42], URZ ;
        /*68e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR62+0x10430], R4 ;
        /*68f0*/              @!P5 BRA `(.L_x_22) ;
.L_x_39:
        /*6900*/                   LDL R2, [R1] ;
        /*0190*/                   BRA.U !UP0, `(.L_x_40) ;
        /*f350*/                   CALL.REL.NOINC `($__internal_1) ;
.L_x_40:
        /*f370*/                   EXIT ;
.L_x_22:
        /*f410*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR62+0x10430], R4 ;
        /*f420*/              @!P5 BRA `(.L_x_22) ;
        /*f430*/                   BRA `(.L_x_39) ;
$__internal_1:
        /*f5c0*/                   BPT.TRAP 0x1 ;
        /*f5e0*/                   RET.REL.NODEC R2 `(tok) ;
"""

WGMMA_CHAINS = """\
.L_x_1:
        /*5a90*/                   WARPGROUP.ARRIVE ;
        /*5aa0*/                   HGMMA.64x32x16.F32.BF16 R120, R152, gdesc[UR8], RZ, !UPT ;
        /*5ac0*/                   HGMMA.64x32x16.F32.BF16 R120, R156, gdesc[UR16], R120 ;
        /*5b00*/                   HGMMA.64x32x16.F32.BF16 R120, R160, gdesc[UR16], R120, gsb0 ;
        /*5cb0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*5f20*/                   WARPGROUP.ARRIVE ;
        /*5f30*/                   HGMMA.64x32x16.F32.BF16 R120, R144, gdesc[UR16], R120, gsb0 ;
        /*5f90*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*6a00*/                   HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR16].tnspB, R24 ;
        /*6b50*/                   HGMMA.64x128x16.F32.BF16 R24, R144, gdesc[UR16].tnspB, R24, gsb0 ;
        /*6e80*/              @!P5 BRA `(.L_x_1) ;
        /*6eb0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""

WGMMA_SERIALISED = """\
        /*5510*/                   HGMMA.64x32x16.F32.BF16 R120, R144, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*5530*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*5540*/                   WARPGROUP.ARRIVE ;
        /*5550*/                   HGMMA.64x32x16.F32.BF16 R120, R148, gdesc[UR12], R120, gsb0 ;
        /*5590*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*55a0*/                   WARPGROUP.ARRIVE ;
        /*55b0*/                   HGMMA.64x32x16.F32.BF16 R120, R152, gdesc[UR12], R120, gsb0 ;
        /*55f0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""

AMDGCN = """\
tok:                                    ; @tok
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	scratch_store_dword off, v158, off      ; 4-byte Folded Spill
	s_cbranch_scc1 .LBB0_51
.LBB0_49:                               ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	scratch_load_dword v71, off, off offset:256 ; 4-byte Folded Reload
	s_cbranch_scc1 .LBB0_49
.LBB0_51:
	s_endpgm
	.amdhsa_private_segment_fixed_size 268
; TotalNumVgprs: 369
"""


def test_spills_are_counted_and_told_apart_by_loop():
    counts = count_sass(SPILLS_IN_A_LOOP)
    assert (counts.spill_stores, counts.spill_loads, counts.spills) == (2, 2, 4)
    assert counts.loop_spills == 1
    assert counts.hmma == 1
    assert counts.instructions == 13
    assert counts.loop_instructions == 6  # five of .L_x_2, and the idle branch to itself at the end


def test_a_backward_branch_that_is_no_cycle_is_no_loop():
    counts = count_sass(WAITS_OUT_OF_LINE)
    assert counts.loop_instructions == 2  # the waiting itself
    assert (counts.spills, counts.loop_spills) == (2, 0)
    assert counts.tcgen05 == 2
    assert counts.hmma == 0


def test_one_wait_behind_a_chain_of_wgmma_is_no_serialisation():
    counts = count_sass(WGMMA_CHAINS)
    assert (counts.hgmma, counts.hmma, counts.wgmma_waits) == (6, 0, 3)
    assert not counts.serialised


def test_a_wait_behind_every_wgmma_is():
    counts = count_sass(WGMMA_SERIALISED)
    assert (counts.hgmma, counts.wgmma_waits) == (3, 3)
    assert counts.serialised


def test_a_wait_that_leaves_products_in_flight_is_no_serialisation():
    assert not count_sass(WGMMA_SERIALISED.replace("gsb0, 0x0", "gsb0, 0x1")).serialised


def test_a_loop_around_a_single_wgmma_is_no_serialisation():
    single = WGMMA_SERIALISED.splitlines(keepends=True)[:2]
    body = "".join([".L_x_1:\n", *single, "        /*6e80*/              @!P5 BRA `(.L_x_1) ;\n"])
    counts = count_sass(body)
    assert (counts.hgmma, counts.wgmma_waits, counts.serialised) == (1, 1, False)


def test_amd_assembly():
    counts = count_amdgcn(AMDGCN)
    assert (counts.spill_stores, counts.spill_loads, counts.loop_spills) == (1, 1, 1)
    assert counts.mfma == 1
    assert counts.instructions == 7
    assert counts.loop_instructions == 3


def test_straight_code_and_no_code_have_no_loops():
    assert in_loop([]) == []
    listing = parse_sass("        /*0000*/                   LDC R1, c[0x0][0x28] ;\n")
    assert in_loop(listing) == [False]


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
    from fastmixer.aot import programs_per_multiprocessor

    assert programs_per_multiprocessor(arch, registers, num_warps, shared, tensor) == expected


def test_every_target_has_a_multiprocessor_that_holds_a_program_of_its_shared_memory():
    from fastmixer.aot import programs_per_multiprocessor

    for target in TARGETS.values():
        assert programs_per_multiprocessor(target.arch, 32, 4, target.shared_memory) == 1


def test_unknown_arch_is_named():
    from fastmixer.aot import programs_per_multiprocessor

    with pytest.raises(ValueError, match="arch: expected one of .* got 70"):
        programs_per_multiprocessor(70, 32, 4, 0)
    with pytest.raises(ValueError, match="'sm_9'; did you mean sm_90"):
        compile_report.run(["sm_9"])


def test_an_interpreted_kernel_is_refused():
    from fastmixer.aot import compile_launch

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

from fastmixer.aot import gpu_target, signature
from fastmixer.configs import TARGETS
from fastmixer.launch import Launch


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


# --- The command, over the whole catalogue. One call for all archs: starting the workers takes seconds.


@pytest.fixture(scope="module")
def reports():
    """Rows, by arch, of one ``python -m fastmixer compile --json``, run where the interpreter is on."""
    ran = subprocess.run(
        [sys.executable, "-m", "fastmixer", "compile", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert ran.stdout, ran.stderr
    found = json.loads(ran.stdout)
    assert found["ok"] == (ran.returncode == 0)
    return {arch: [row for row in found["rows"] if row["arch"] == arch] for arch in TARGETS}


in_one_process = pytest.mark.xdist_group("compile")  # of pytest-xdist, or each would compile everything


@in_one_process
@pytest.mark.parametrize("arch", TARGETS)
def test_the_catalogue_compiles_and_fits(reports, arch):
    rows = reports[arch]
    assert rows
    assert {row["label"]: row["error"] for row in rows if not row["ok"]} == {}
    for row in rows:
        assert row["arch"] == arch
        assert row["shared_memory"] <= row["shared_memory_limit"] == TARGETS[arch].shared_memory
        assert row["programs_per_multiprocessor"] >= 1
        assert 0 < row["registers"] <= (512 if arch == "gfx942" else 255)


PRODUCTS = ("token_mixing_fwd", "fc1_fwd", "fc2_fwd")


@in_one_process
@pytest.mark.parametrize("model", ["B/16", "S/16"])
def test_hopper_defaults_run_on_wgmma_unserialised_and_unspilled(reports, model):
    rows = [row for row in reports["sm_90"] if row["label"].endswith(f" {model} bfloat16")]
    with_products = [row for row in rows if row["label"].startswith(PRODUCTS)]
    assert {row["label"].split()[0] for row in with_products} == set(PRODUCTS)
    assert {row["label"] for row in with_products if not row["hgmma"]} == set()
    assert {row["label"]: row["hmma"] for row in rows if row["hmma"]} == {}
    assert {row["label"] for row in rows if row["serialised"]} == set()
    allowed = 0 if rows[0]["triton"].startswith("3.6.") else 31
    assert {row["label"]: row["spills"] for row in rows if row["spills"] > allowed} == {}


@in_one_process
@pytest.mark.parametrize("arch", TARGETS)
def test_16_bit_products_run_on_matrix_units(reports, arch):
    unit = {"sm_90": "hgmma", "sm_100": "tcgen05", "gfx942": "mfma"}.get(arch, "hmma")
    rows = [row for row in reports[arch] if row["label"].startswith(PRODUCTS) and "float16" in row["label"]]
    assert rows
    assert {row["label"] for row in rows if not row[unit]} == set()
