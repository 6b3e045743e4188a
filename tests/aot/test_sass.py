"""The reading of assembly, on lines from nvdisasm 12.8 and 13.1 and from LLVM, with instructions left out."""

from types import SimpleNamespace

import pytest

from fastmixer.aot.sass import count, in_loop, parse, product_loops

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

# A program that takes one tile after the other: the outer loop has the loop over K and an epilogue.
PERSISTENT = """\
        /*00d0*/               @P0 EXIT ;
.L_x_2:
        /*11e0*/              @!P2 BRA `(.L_x_0) ;
.L_x_1:
        /*1920*/                   WARPGROUP.ARRIVE ;
        /*1940*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*1a80*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*1ab0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*1c30*/              @!P3 BRA `(.L_x_1) ;
.L_x_0:
        /*1c40*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1c50*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*8940*/              @!P3 BRA `(.L_x_2) ;
"""

# A loop over K whose operands come through a barrier: it is waited for in a loop of its own.
BARRIER_IN_A_LOOP = """\
        /*0010*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR62+0x10430], R4 ;
        /*0110*/              @!P5 BRA `(.L_x_1) ;
        /*0120*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0130*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
.L_x_2:
        /*0140*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR62+0x10430], R4 ;
        /*0150*/              @!P5 BRA `(.L_x_2) ;
        /*0160*/              @!P3 BRA `(.L_x_1) ;
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


def counted(text: str, backend: str = "cuda") -> SimpleNamespace:
    return SimpleNamespace(**count(parse(text, backend)))


def test_spills_are_counted_and_told_apart_by_loop():
    counts = counted(SPILLS_IN_A_LOOP)
    assert (counts.spill_stores, counts.spill_loads, counts.spills) == (2, 2, 4)
    assert counts.loop_spills == 1
    assert counts.hmma == 1
    assert counts.instructions == 12  # without the padding behind the end
    assert counts.loop_instructions == 5  # of .L_x_2; without the idle branch to itself at the end


def test_a_backward_branch_that_is_no_cycle_is_no_loop():
    counts = counted(WAITS_OUT_OF_LINE)
    assert counts.loop_instructions == 2  # the waiting itself
    assert (counts.spills, counts.loop_spills) == (2, 0)
    assert counts.tcgen05 == 2
    assert counts.hmma == 0


def test_one_wait_behind_a_chain_of_wgmma_is_no_serialisation():
    counts = counted(WGMMA_CHAINS)
    assert (counts.hgmma, counts.hmma, counts.wgmma_waits) == (6, 0, 3)
    assert not counts.serialised


def test_a_wait_behind_every_wgmma_is():
    counts = counted(WGMMA_SERIALISED)
    assert (counts.hgmma, counts.wgmma_waits) == (3, 3)
    assert counts.serialised


def test_a_wait_that_leaves_products_in_flight_is_no_serialisation():
    assert not counted(WGMMA_SERIALISED.replace("gsb0, 0x0", "gsb0, 0x1")).serialised


def test_a_loop_around_a_single_wgmma_is_no_serialisation():
    single = WGMMA_SERIALISED.splitlines(keepends=True)[:2]
    body = "".join([".L_x_1:\n", *single, "        /*6e80*/              @!P5 BRA `(.L_x_1) ;\n"])
    counts = counted(body)
    assert (counts.hgmma, counts.wgmma_waits, counts.serialised) == (1, 1, False)


def test_full_waits_are_those_of_one_iteration():
    assert counted(WGMMA_CHAINS).full_waits == 2  # the third lies behind the loop
    assert counted(WGMMA_CHAINS.replace("gsb0, 0x0", "gsb0, 0x1")).full_waits == 0
    assert counted(WGMMA_SERIALISED).full_waits == 0  # no loop
    assert counted(SPILLS_IN_A_LOOP).full_waits == 0  # nor any wgmma


def test_of_nested_loops_the_one_over_products_counts():
    assert counted(PERSISTENT).full_waits == 0
    assert counted(PERSISTENT.replace("gsb0, 0x1", "gsb0, 0x0")).full_waits == 1
    assert counted(BARRIER_IN_A_LOOP).full_waits == 1


def test_a_loop_over_tiles_is_no_loop_over_products():
    """What a persistent kernel does once a tile is its epilogue."""
    counts, (loop,) = counted(PERSISTENT), product_loops(parse(PERSISTENT))
    assert counts.loop_instructions == len(loop) < sum(in_loop(parse(PERSISTENT.replace("HGMMA", "FFMA"))))
    assert counts.epilogue_instructions > 0


@pytest.mark.parametrize("first, second", [(PERSISTENT, WGMMA_CHAINS), (WGMMA_CHAINS, PERSISTENT)])
def test_of_loops_one_after_the_other_the_one_that_waits_most_counts(first, second):
    """As in a kernel that makes two products."""
    assert counted(first + second.replace(".L_x_", ".L_y_")).full_waits == 2


def test_the_width_of_wgmma_is_the_widest_in_a_loop():
    assert counted(WGMMA_CHAINS).wgmma_columns == 128
    assert counted(BARRIER_IN_A_LOOP).wgmma_columns == 256
    assert counted(PERSISTENT).wgmma_columns == 128
    assert counted(WGMMA_SERIALISED).wgmma_columns == 0  # none in a loop
    assert counted(SPILLS_IN_A_LOOP).wgmma_columns == 0  # mma.sync


def test_amd_assembly():
    counts = counted(AMDGCN, "hip")
    assert (counts.spill_stores, counts.spill_loads, counts.loop_spills) == (1, 1, 1)
    assert counts.mfma == 1
    assert counts.instructions == 7
    assert counts.loop_instructions == 3


def test_straight_code_and_no_code_have_no_loops():
    assert in_loop([]) == []
    listing = parse("        /*0000*/                   LDC R1, c[0x0][0x28] ;\n")
    assert in_loop(listing) == [False]


def test_epilogue_lies_behind_the_last_product_of_a_loop():
    # LDL and EXIT behind the loop and what is laid out behind it; not the STL before it, nor the padding.
    assert counted(SPILLS_IN_A_LOOP).epilogue_instructions == 5
    assert counted("        /*0000*/  HMMA.16816.F32 R4, R8, R12, R4 ;\n").epilogue_instructions == 0
