"""Backward of token mixing for sequences of up to about 256 tokens: dn, and the gradients of the weights.

Nothing of the hidden's size is kept by the forward or reaches memory here: both kernels recompute H from
n = LN(x), and dG = W2^T g, where g is the gradient of the half's output times the residual scale.

    dgrad   a program owns BLOCK_C channels of one sample and walks over the hidden units, like the forward
    wgrad   a program owns BLOCK_D hidden units and walks over its share of the (sample, channel block) pairs

wgrad writes a partial of its own for every share, which a reduction adds up: no atomics, so two runs give
the same bits. The token axis is cut into pieces P0 >= P1 >= P2 as in ``token_mixing``. A tile of padding
is zero: channels beyond C have n = g = 0, hence dG = dH = 0 and G g^T = 0; tokens beyond S likewise.
"""

import triton
import triton.language as tl

from .activations import gelu_and_derivative


@triton.jit
def _load_piece(
    x_ptr,  # (S, C) of one sample, contiguous
    c,  # (BLOCK_C,) channel indices
    S,
    C,
    START: tl.constexpr,
    PIECE: tl.constexpr,
):
    """x for tokens [START, START + PIECE): a (PIECE, BLOCK_C) tile, zero beyond S and C."""
    s = START + tl.arange(0, PIECE)
    return tl.load(x_ptr + (s[:, None] * C + c[None, :]), mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _store_dn(
    dn,  # (BLOCK_C, PIECE), accumulation dtype
    dn_ptr,  # (S, C) of this sample, contiguous
    c,  # (BLOCK_C,)
    S,
    C,
    START: tl.constexpr,
    PIECE: tl.constexpr,
):
    s = START + tl.arange(0, PIECE)
    valid = (c < C)[:, None] & (s < S)[None, :]  # (BLOCK_C, PIECE)
    tl.store(dn_ptr + (s[None, :] * C + c[:, None]), dn.to(dn_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _token_mixing_dgrad_kernel(
    n_ptr,  # (B, S, C) contiguous, compute dtype: LN(x)
    g_ptr,  # (B, S, C) contiguous, compute dtype: scaled gradient of the output
    w1_ptr,  # (D, S_PAD) packed, contiguous; what lies beyond S (zeros, the forward's bias) meets zeros of n
    b1_ptr,  # (D,) accumulation dtype, or None
    w2_ptr,  # (S_PAD, D) packed, contiguous, zeros beyond S
    dn_ptr,  # (B, S, C) contiguous, compute dtype
    S,
    C,
    D,  # a multiple of BLOCK_D: packing pads it with zeros, which make dG and so dH zero
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dn = W1^T (W2^T g * gelu'(W1 n + b1)); grid (B * cdiv(C, BLOCK_C),)."""
    S_PAD: tl.constexpr = P0 + P1 + P2
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    base = (tl.program_id(0) // blocks).to(tl.int64) * S * C
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_ptr += base
    g_ptr += base

    n0 = tl.trans(_load_piece(n_ptr, c, S, C, 0, P0))  # (BLOCK_C, piece)
    g0 = tl.trans(_load_piece(g_ptr, c, S, C, 0, P0))
    dn0 = tl.zeros((BLOCK_C, P0), ACC)
    if P1:
        n1 = tl.trans(_load_piece(n_ptr, c, S, C, P0, P1))
        g1 = tl.trans(_load_piece(g_ptr, c, S, C, P0, P1))
        dn1 = tl.zeros((BLOCK_C, P1), ACC)
    if P2:
        n2 = tl.trans(_load_piece(n_ptr, c, S, C, P0 + P1, P2))
        g2 = tl.trans(_load_piece(g_ptr, c, S, C, P0 + P1, P2))
        dn2 = tl.zeros((BLOCK_C, P2), ACC)

    d_block = tl.arange(0, BLOCK_D)
    s0 = tl.arange(0, P0)
    for start in tl.range(0, D, BLOCK_D):
        d = start + d_block
        w1_rows = w1_ptr + d[:, None] * S_PAD  # W1 tiles are (BLOCK_D, piece), s contiguous
        w2_cols = w2_ptr + d[None, :]  # W2 tiles are (piece, BLOCK_D), d contiguous
        w1_0 = tl.load(w1_rows + s0[None, :])
        w2_0 = tl.load(w2_cols + s0[:, None] * D)
        h = tl.dot(n0, tl.trans(w1_0), input_precision=INPUT_PRECISION, out_dtype=ACC)  # (BLOCK_C, BLOCK_D)
        dg = tl.dot(g0, w2_0, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P1:
            s1 = P0 + tl.arange(0, P1)
            w1_1 = tl.load(w1_rows + s1[None, :])
            w2_1 = tl.load(w2_cols + s1[:, None] * D)
            h = tl.dot(n1, tl.trans(w1_1), h, input_precision=INPUT_PRECISION, out_dtype=ACC)
            dg = tl.dot(g1, w2_1, dg, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P2:
            s2 = P0 + P1 + tl.arange(0, P2)
            w1_2 = tl.load(w1_rows + s2[None, :])
            w2_2 = tl.load(w2_cols + s2[:, None] * D)
            h = tl.dot(n2, tl.trans(w1_2), h, input_precision=INPUT_PRECISION, out_dtype=ACC)
            dg = tl.dot(g2, w2_2, dg, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if b1_ptr is not None:
            h += tl.load(b1_ptr + d).to(ACC)[None, :]
        _, derivative = gelu_and_derivative(h, APPROXIMATE, POLYNOMIAL)
        dh = (dg * derivative).to(DTYPE)
        dn0 = tl.dot(dh, w1_0, dn0, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P1:
            dn1 = tl.dot(dh, w1_1, dn1, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P2:
            dn2 = tl.dot(dh, w1_2, dn2, input_precision=INPUT_PRECISION, out_dtype=ACC)

    dn_ptr += base
    _store_dn(dn0, dn_ptr, c, S, C, 0, P0)
    if P1:
        _store_dn(dn1, dn_ptr, c, S, C, P0, P1)
    if P2:
        _store_dn(dn2, dn_ptr, c, S, C, P0 + P1, P2)


@triton.jit(do_not_specialize=["B", "SPLITS"])
def _token_mixing_wgrad_kernel(
    n_ptr,  # (B, S, C) contiguous, compute dtype: LN(x)
    g_ptr,  # (B, S, C) contiguous, compute dtype: scaled gradient of the output
    w1_ptr,  # (D, S_PAD) packed, contiguous; what lies beyond S (zeros, the forward's bias) meets zeros of n
    b1_ptr,  # (D,) accumulation dtype, or None
    w2_ptr,  # (S_PAD, D) packed, contiguous, zeros beyond S
    dw1_ptr,  # (SPLITS, D, S_PAD) partials, accumulation dtype, or None: not wanted
    db1_ptr,  # (SPLITS, D) partials, accumulation dtype, or None
    dw2_ptr,  # (SPLITS, D, S_PAD) partials of dW2^T, accumulation dtype, or None
    B,
    S,
    C,
    D,  # a multiple of BLOCK_D
    SPLITS,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dW1 = dH n^T, dW2^T = G g^T, db1 = sum dH; grid (D / BLOCK_D * SPLITS,).

    What is None costs nothing. Beyond 144 tokens dW1 and dW2 take a launch each: together their accumulators
    spill in the loop (sm_90, compiled), while a second H is one product in five.
    """
    S_PAD: tl.constexpr = P0 + P1 + P2
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    NEED_DH: tl.constexpr = dw1_ptr is not None or db1_ptr is not None
    # Neighbouring programs have the same share and so find n and g in L2.
    hidden_blocks = D // BLOCK_D
    split = tl.program_id(0) // hidden_blocks
    d = (tl.program_id(0) % hidden_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    blocks = tl.cdiv(C, BLOCK_C)
    pairs = B * blocks
    share = tl.cdiv(pairs, SPLITS)
    c_block = tl.arange(0, BLOCK_C)

    s0 = tl.arange(0, P0)
    w1_0 = tl.load(w1_ptr + d[:, None] * S_PAD + s0[None, :])  # (BLOCK_D, piece)
    w2_0 = tl.trans(tl.load(w2_ptr + s0[:, None] * D + d[None, :]))
    dw1_0 = tl.zeros((BLOCK_D, P0), ACC)
    dw2_0 = tl.zeros((BLOCK_D, P0), ACC)
    if P1:
        s1 = P0 + tl.arange(0, P1)
        w1_1 = tl.load(w1_ptr + d[:, None] * S_PAD + s1[None, :])
        w2_1 = tl.trans(tl.load(w2_ptr + s1[:, None] * D + d[None, :]))
        dw1_1 = tl.zeros((BLOCK_D, P1), ACC)
        dw2_1 = tl.zeros((BLOCK_D, P1), ACC)
    if P2:
        s2 = P0 + P1 + tl.arange(0, P2)
        w1_2 = tl.load(w1_ptr + d[:, None] * S_PAD + s2[None, :])
        w2_2 = tl.trans(tl.load(w2_ptr + s2[:, None] * D + d[None, :]))
        dw1_2 = tl.zeros((BLOCK_D, P2), ACC)
        dw2_2 = tl.zeros((BLOCK_D, P2), ACC)
    db1 = tl.zeros((BLOCK_D,), ACC)
    b1 = None
    if b1_ptr is not None:
        b1 = tl.load(b1_ptr + d).to(ACC)

    first = split * share
    sample = first // blocks
    block = first % blocks
    for _ in tl.range(first, tl.minimum(first + share, pairs)):
        base = sample.to(tl.int64) * S * C
        c = block * BLOCK_C + c_block
        # Counted on: dividing here would be a tenth of the loop's instructions.
        block += 1
        sample = tl.where(block < blocks, sample, sample + 1)
        block = tl.where(block < blocks, block, 0)
        n0 = _load_piece(n_ptr + base, c, S, C, 0, P0)  # (piece, BLOCK_C)
        g0 = _load_piece(g_ptr + base, c, S, C, 0, P0)
        h = tl.dot(w1_0, n0, input_precision=INPUT_PRECISION, out_dtype=ACC)  # (BLOCK_D, BLOCK_C)
        if P1:
            n1 = _load_piece(n_ptr + base, c, S, C, P0, P1)
            g1 = _load_piece(g_ptr + base, c, S, C, P0, P1)
            h = tl.dot(w1_1, n1, h, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P2:
            n2 = _load_piece(n_ptr + base, c, S, C, P0 + P1, P2)
            g2 = _load_piece(g_ptr + base, c, S, C, P0 + P1, P2)
            h = tl.dot(w1_2, n2, h, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if b1 is not None:
            h += b1[:, None]
        hidden, derivative = gelu_and_derivative(h, APPROXIMATE, POLYNOMIAL)
        if NEED_DH:
            dg = tl.dot(w2_0, g0, input_precision=INPUT_PRECISION, out_dtype=ACC)
            if P1:
                dg = tl.dot(w2_1, g1, dg, input_precision=INPUT_PRECISION, out_dtype=ACC)
            if P2:
                dg = tl.dot(w2_2, g2, dg, input_precision=INPUT_PRECISION, out_dtype=ACC)
            dh = dg * derivative
            if db1_ptr is not None:
                db1 += tl.sum(dh, axis=1)
            if dw1_ptr is not None:
                dh = dh.to(DTYPE)
                dw1_0 = tl.dot(dh, tl.trans(n0), dw1_0, input_precision=INPUT_PRECISION, out_dtype=ACC)
                if P1:
                    dw1_1 = tl.dot(dh, tl.trans(n1), dw1_1, input_precision=INPUT_PRECISION, out_dtype=ACC)
                if P2:
                    dw1_2 = tl.dot(dh, tl.trans(n2), dw1_2, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if dw2_ptr is not None:
            hidden = hidden.to(DTYPE)
            dw2_0 = tl.dot(hidden, tl.trans(g0), dw2_0, input_precision=INPUT_PRECISION, out_dtype=ACC)
            if P1:
                dw2_1 = tl.dot(hidden, tl.trans(g1), dw2_1, input_precision=INPUT_PRECISION, out_dtype=ACC)
            if P2:
                dw2_2 = tl.dot(hidden, tl.trans(g2), dw2_2, input_precision=INPUT_PRECISION, out_dtype=ACC)

    rows = split.to(tl.int64) * D + d  # of the partials
    if db1_ptr is not None:
        tl.store(db1_ptr + rows, db1)
    if dw1_ptr is not None:
        dw1_rows = dw1_ptr + rows[:, None] * S_PAD
        tl.store(dw1_rows + s0[None, :], dw1_0)
        if P1:
            tl.store(dw1_rows + s1[None, :], dw1_1)
        if P2:
            tl.store(dw1_rows + s2[None, :], dw1_2)
    if dw2_ptr is not None:
        dw2_rows = dw2_ptr + rows[:, None] * S_PAD
        tl.store(dw2_rows + s0[None, :], dw2_0)
        if P1:
            tl.store(dw2_rows + s1[None, :], dw2_1)
        if P2:
            tl.store(dw2_rows + s2[None, :], dw2_2)
