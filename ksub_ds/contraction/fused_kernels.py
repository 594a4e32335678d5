# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the fused sum over all tokens, which `ksub_ds.contraction.fused` launches.

The fold, of the box A (S, J, C) of the tokens' weights with the factors e_1 (R, S), e_2 (R, J), e_3 (R, C):

    W_i = e_3 A_i^T                g1[r,i] = sum_j e_2[r,j] W_i[r,j] = dZ/de_1[r,i]
                                   g2[r,j] = sum_i e_1[r,i] W_i[r,j] = dZ/de_2[r,j]      Z[r] = sum_j e_2[r,j] g2[r,j]
                                   g3[r,c] = sum_i e_1[r,i] (e_2 A_i)[r,c] = dZ/de_3[r,c]
    dlogZ/dA[i,j,c] summed over r  = sum_r e_1[r,i] / Z[r] · e_2[r,j] · e_3[r,c]

Z is linear in each factor, so nothing is computed twice, and W_i lives in registers only. No program writes where
another does, so results do not depend on the order in which programs run.

Operands of the tensor cores are split in bf16 high and low parts; high·high + high·low + low·high is within 2^-16 of
their product, and its rounding errors are independent over the sum. Accumulators are float32. EMULATE keeps the parts
in float32 for Triton's interpreter, which has no products of bf16; those are exact in float32, so nothing changes.

Legend: R rows (RP with the padding of the buffers), S, J, C codes of the three groups of tables (the tiles of J and C
are powers of two), X tokens outside the box, N tokens, K tables, WIDTH codes of all tables: a row's scores lie next to
each other.
"""

import triton
import triton.language as tl


@triton.jit
def _high(x, EMULATE: tl.constexpr):
    if EMULATE:  # the interpreter's own conversion cuts off; the hardware rounds to nearest, ties to even
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _low(x, high, EMULATE: tl.constexpr):
    return _high(x - high.to(tl.float32), EMULATE)


@triton.jit
def _product(a_high, a_low, b_high, b_low, LOW_B: tl.constexpr):
    """Return a @ b, small terms first. Without LOW_B, b is its high part."""
    acc = tl.dot(a_low, b_high, out_dtype=tl.float32, input_precision="ieee")
    if LOW_B:
        acc = tl.dot(a_high, b_low, acc, out_dtype=tl.float32, input_precision="ieee")
    return tl.dot(a_high, b_high, acc, out_dtype=tl.float32, input_precision="ieee")


@triton.jit
def weigh_cells(bias, largest, token_of_cell, high, low, CELLS, BLOCK: tl.constexpr, EMULATE: tl.constexpr):
    """Write the box of weights exp(b_n - max b), in two parts; 0 where no token is."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < CELLS
    token = tl.load(token_of_cell + cell, mask=inside, other=-1)
    exponent = tl.load(bias + token, mask=token >= 0, other=0.0).to(tl.float64) - tl.load(largest).to(tl.float64)
    weight = tl.where(token >= 0, tl.exp(exponent), 0.0).to(tl.float32)
    weight_high = _high(weight, EMULATE)
    tl.store(high + cell, weight_high, mask=inside)
    tl.store(low + cell, _low(weight, weight_high, EMULATE), mask=inside)


@triton.jit
def _sum_scores(row_scores, columns, MEMBERS, WIDTH, at, row_ok, BR: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the scores of MEMBERS codes each, (BR, BLOCK): those in `columns` (MEMBERS, WIDTH). -inf beyond them."""
    total = tl.zeros((BR, BLOCK), dtype=tl.float64)
    for member in range(MEMBERS):
        column = tl.load(columns + member * WIDTH + at, mask=at < WIDTH, other=0)
        total += tl.load(row_scores[:, None] + column[None, :], mask=row_ok[:, None], other=0.0)
    return tl.where((at < WIDTH)[None, :], total, float("-inf"))


@triton.jit
def _write_factor(
    row_scores, columns, MEMBERS, WIDTH, rows, row_ok, e, e_high, e_low,
    BR: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Write the factor of a group that fits one tile, (BR, BLOCK), and its two parts; return the maxima, (BR,)."""
    at = tl.arange(0, BLOCK)
    s = _sum_scores(row_scores, columns, MEMBERS, WIDTH, at, row_ok, BR, BLOCK)
    top = tl.max(s, axis=1)
    factor = tl.where(row_ok[:, None], tl.exp(s - top[:, None]), 0.0).to(tl.float32)
    high = _high(factor, EMULATE)
    place = rows[:, None] * BLOCK + at[None, :]
    tl.store(e + place, factor)
    tl.store(e_high + place, high)
    tl.store(e_low + place, _low(factor, high, EMULATE))
    return top


@triton.jit
def make_factors(
    scores, columns1, columns2, columns3, top, e1t, e2, e2_high, e2_low, e3, e3_high, e3_low,
    R, RP, WIDTH, S, J, C, MEMBERS1, MEMBERS2, MEMBERS3,
    BR: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Write the factors exp(s - max s) of the three groups, 0 in the padding, and the sum of the three maxima."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    row_ok = rows < R
    row_scores = scores + rows * WIDTH
    i = tl.arange(0, BI)
    top1 = tl.full((BR,), float("-inf"), dtype=tl.float64)
    for first in range(0, S, BI):
        s = _sum_scores(row_scores, columns1, MEMBERS1, S, first + i, row_ok, BR, BI)
        top1 = tl.maximum(top1, tl.max(s, axis=1))
    for first in range(0, S, BI):
        s = _sum_scores(row_scores, columns1, MEMBERS1, S, first + i, row_ok, BR, BI)
        e = tl.where(row_ok[:, None], tl.exp(s - top1[:, None]), 0.0).to(tl.float32)
        tl.store(e1t + (first + i)[None, :] * RP + rows[:, None], e, mask=(first + i < S)[None, :])
    top2 = _write_factor(row_scores, columns2, MEMBERS2, J, rows, row_ok, e2, e2_high, e2_low, BR, BJ, EMULATE)
    top3 = _write_factor(row_scores, columns3, MEMBERS3, C, rows, row_ok, e3, e3_high, e3_low, BR, BC, EMULATE)
    tl.store(top + rows, top1 + top2 + top3)


@triton.jit
def fold_over_c(
    e1t, e2, e3_high, e3_low, a_high, a_low, g1, g2_part, RP, S, STEPS,
    BR: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write g1, and the share of g2 of STEPS values of i, by W_i = e_3 A_i^T. e_3's parts stay in shared memory."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    part = tl.program_id(1)
    j = tl.arange(0, BJ)
    c = tl.arange(0, BC)
    place_RC = rows[:, None] * BC + c[None, :]
    e3_high_RC = tl.load(e3_high + place_RC)
    e3_low_RC = tl.load(e3_low + place_RC)
    place_RJ = rows[:, None] * BJ + j[None, :]
    e2_RJ = tl.load(e2 + place_RJ)
    g2_RJ = tl.zeros((BR, BJ), dtype=tl.float32)
    cell = j[:, None] * BC + c[None, :]
    for i in tl.range(part * STEPS, min(part * STEPS + STEPS, S), num_stages=STAGES):
        high_CJ = tl.trans(tl.load(a_high + i * (BJ * BC) + cell))
        low_CJ = tl.trans(tl.load(a_low + i * (BJ * BC) + cell)) if WEIGHTED else high_CJ
        w_RJ = _product(e3_high_RC, e3_low_RC, high_CJ, low_CJ, WEIGHTED)
        x = tl.load(e1t + i * RP + rows)
        if GRADIENTS:
            tl.store(g1 + i * RP + rows, tl.sum(w_RJ * e2_RJ, axis=1))
        g2_RJ += x[:, None] * w_RJ
    tl.store(g2_part + part * RP * BJ + place_RJ, g2_RJ)


@triton.jit
def fold_over_j(
    e1t, e2_high, e2_low, a_high, a_low, g3_part, RP, S, STEPS,
    BR: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, WEIGHTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the share of g3 of STEPS values of i. e_1 is taken out of the product, so e_2's parts never change."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    part = tl.program_id(1)
    j = tl.arange(0, BJ)
    c = tl.arange(0, BC)
    place_RJ = rows[:, None] * BJ + j[None, :]
    e2_high_RJ = tl.load(e2_high + place_RJ)
    e2_low_RJ = tl.load(e2_low + place_RJ)
    g3_RC = tl.zeros((BR, BC), dtype=tl.float32)
    cell = j[:, None] * BC + c[None, :]
    for i in tl.range(part * STEPS, min(part * STEPS + STEPS, S), num_stages=STAGES):
        high_JC = tl.load(a_high + i * (BJ * BC) + cell)
        low_JC = tl.load(a_low + i * (BJ * BC) + cell) if WEIGHTED else high_JC
        x = tl.load(e1t + i * RP + rows)
        g3_RC += x[:, None] * _product(e2_high_RJ, e2_low_RJ, high_JC, low_JC, WEIGHTED)
    tl.store(g3_part + part * RP * BC + rows[:, None] * BC + c[None, :], g3_RC)


@triton.jit
def finish_rows(
    scores, outside_columns, outside, bias, largest, top, e1t, e2, e3, g1, g2_part, g3_part, labels,
    log_partition, scale, far, group_probs, outside_probs,
    R, RP, WIDTH, S, J, C, K, X, PARTS, SMALLEST, IGNORED,
    BR: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr,
    WEIGHTED: tl.constexpr, LABELLED: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Write log Z, the probabilities of the groups' codes and of the tokens outside the box, and which rows underflow.

    With scale = exp(sum of maxima - log Z), p_n = scale · w_n · e_1 · e_2 · e_3. It is 0 where nothing is to be added:
    in ignored rows, and in those that underflow, which `fold_far_rows` does.
    """
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    row_ok = rows < R
    j = tl.arange(0, BJ)
    g2_RJ = tl.zeros((BR, BJ), dtype=tl.float32)
    for part in range(PARTS):
        g2_RJ += tl.load(g2_part + (part * RP + rows)[:, None] * BJ + j[None, :])
    q2_RJ = g2_RJ * tl.load(e2 + rows[:, None] * BJ + j[None, :])
    z = tl.sum(q2_RJ, axis=1)
    tops = tl.load(top + rows)
    if WEIGHTED:
        tops += tl.load(largest).to(tl.float64)
    total = tl.log(z.to(tl.float64)) + tops
    if BX:  # the two sums, over the box and over the few tokens outside it, become one
        x = tl.arange(0, BX)
        logits_RX = _sum_scores(scores + rows * WIDTH, outside_columns, K, X, x, row_ok, BR, BX)
        if WEIGHTED:
            token = tl.load(outside + x, mask=x < X, other=0)
            logits_RX += tl.load(bias + token, mask=x < X, other=0.0).to(tl.float64)[None, :]
        most = tl.maximum(total, tl.max(logits_RX, axis=1))
        total = tl.log(tl.exp(total - most) + tl.sum(tl.exp(logits_RX - most[:, None]), axis=1)) + most
    wanted = row_ok
    if LABELLED:
        wanted = row_ok & (tl.load(labels + rows, mask=row_ok, other=0) != IGNORED)
    near = wanted & (z >= SMALLEST)
    tl.store(log_partition + rows, total, mask=row_ok)
    tl.store(far + rows, (wanted & ~near).to(tl.int32), mask=row_ok)
    if GRADIENTS:
        factor = tl.where(near, tl.exp(tops - total), 0.0).to(tl.float32)
        tl.store(scale + rows, factor)
        place = rows[:, None] * (S + J + C)
        near_R1 = near[:, None]
        q2_RJ = tl.where(near_R1, q2_RJ * factor[:, None], 0.0)
        tl.store(group_probs + place + S + j[None, :], q2_RJ, mask=row_ok[:, None] & (j < J)[None, :])
        c = tl.arange(0, BC)
        g3_RC = tl.zeros((BR, BC), dtype=tl.float32)
        for part in range(PARTS):
            g3_RC += tl.load(g3_part + (part * RP + rows)[:, None] * BC + c[None, :])
        q3_RC = tl.where(near_R1, g3_RC * tl.load(e3 + rows[:, None] * BC + c[None, :]) * factor[:, None], 0.0)
        tl.store(group_probs + place + S + J + c[None, :], q3_RC, mask=row_ok[:, None] & (c < C)[None, :])
        for first in range(0, S, BI):
            i = first + tl.arange(0, BI)
            used = (i < S)[None, :] & row_ok[:, None]
            at = i[None, :] * RP + rows[:, None]
            q1_RI = tl.load(g1 + at, mask=used, other=0.0) * tl.load(e1t + at, mask=used, other=0.0)
            tl.store(group_probs + place + i[None, :], tl.where(near_R1, q1_RI * factor[:, None], 0.0), mask=used)
        if BX:
            p_RX = tl.where(near_R1, tl.exp(logits_RX - total[:, None]), 0.0)
            tl.store(outside_probs + rows[:, None] * BX + x[None, :], p_RX.to(tl.float32), mask=row_ok[:, None])


@triton.jit
def _logits(row_scores, codes, offsets, bias, token, ok, K, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return the logits of BLOCK tokens in one row; -inf where not `ok`."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for k in range(K):
        column = tl.load(codes + token * K + k, mask=ok, other=0) + tl.load(offsets + k)
        total += tl.load(row_scores + column, mask=ok, other=0.0)
    if WEIGHTED:
        total += tl.load(bias + token, mask=ok, other=0.0).to(tl.float64)
    return tl.where(ok, total, float("-inf"))


@triton.jit
def fold_far_rows(
    scores, codes, offsets, bias, by_code, code_starts, far, log_partition, probs, N, K, WIDTH,
    BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Do a row whose Z underflows over its N logits: log Z, then the probability of every code. Else, nothing."""
    row = tl.program_id(0)
    row_scores = scores + row * WIDTH
    if tl.load(far + row) != 0:
        most = tl.full((), -1.0e300, dtype=tl.float64)
        total = tl.zeros((), dtype=tl.float64)
        for first in range(0, N, BLOCK):
            token = first + tl.arange(0, BLOCK)
            logits = _logits(row_scores, codes, offsets, bias, token, token < N, K, BLOCK, WEIGHTED)
            larger = tl.maximum(most, tl.max(logits, axis=0))
            total = total * tl.exp(most - larger) + tl.sum(tl.exp(logits - larger), axis=0)
            most = larger
        log_z = most + tl.log(total)
        tl.store(log_partition + row, log_z)
        if GRADIENTS:
            for column in range(WIDTH):
                end = tl.load(code_starts + column + 1)
                probability = tl.zeros((BLOCK,), dtype=tl.float64)
                for first in range(tl.load(code_starts + column), end, BLOCK):
                    at = first + tl.arange(0, BLOCK)
                    token = tl.load(by_code + at, mask=at < end, other=0)
                    logits = _logits(row_scores, codes, offsets, bias, token, at < end, K, BLOCK, WEIGHTED)
                    probability += tl.exp(logits - log_z)
                tl.store(probs + row * WIDTH + column, tl.sum(probability, axis=0).to(tl.float32))


@triton.jit
def label_losses(
    scores, codes, offsets, bias, labels, log_partition, losses, label_of_row, minus_ones, R, K, WIDTH, IGNORED,
    BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write log Z minus the label's logit; 0 in ignored rows, which count as -0 times label 0.

    The label of a row that counts may be none of these tokens: then it is negative, and its logit counts as 0.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < R
    label = tl.load(labels + rows, mask=row_ok, other=IGNORED)
    counts = row_ok & (label != IGNORED)
    here = counts & (label >= 0)
    label = tl.where(here, label, 0)
    logit = tl.zeros((BLOCK,), dtype=tl.float64)
    for k in range(K):
        column = tl.load(codes + label * K + k) + tl.load(offsets + k)
        logit += tl.load(scores + rows * WIDTH + column, mask=row_ok, other=0.0)
    if WEIGHTED:
        logit += tl.load(bias + label).to(tl.float64)
    logit = tl.where(here, logit, 0.0)
    loss = tl.where(counts, tl.load(log_partition + rows, mask=row_ok, other=0.0) - logit, 0.0)
    tl.store(losses + rows, loss, mask=row_ok)
    tl.store(label_of_row + rows, label, mask=row_ok)
    tl.store(minus_ones + rows, tl.where(here, -1.0, 0.0), mask=row_ok)


@triton.jit
def make_score_grads(
    group_probs, outside_probs, outside_columns, layout, positions, codes, labels, far, grads,
    R, WIDTH, GROUPS_WIDTH, K, X, IGNORED, BR: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """Turn the probabilities of the groups' codes into the gradients of a table's scores, p - [c = f_k(label)].

    p - 1 is computed as minus the sum of the others: without cancellation where the model is nearly sure. Rows that
    underflow have their p in `grads` already. `layout` (K, 6) says where in its group a table lies, see `_layout`.
    """
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    row_ok = rows < R
    k = tl.program_id(1)
    offset = tl.load(layout + k * 6)
    size = tl.load(layout + k * 6 + 1)
    start = tl.load(layout + k * 6 + 2)
    kept = tl.load(layout + k * 6 + 3)
    stride = tl.load(layout + k * 6 + 4)
    repeats = tl.load(layout + k * 6 + 5)
    c = tl.arange(0, BM)
    used = row_ok[:, None] & (c < size)[None, :]
    position = tl.load(positions + offset + c, mask=c < size, other=-1)
    in_group = used & (position >= 0)[None, :]
    p = tl.zeros((BR, BM), dtype=tl.float32)
    for repeat in range(repeats):
        at = start + (repeat // stride * kept + position) * stride + repeat % stride
        p += tl.load(group_probs + rows[:, None] * GROUPS_WIDTH + at[None, :], mask=in_group, other=0.0)
    if BX:
        for x in range(X):
            code = tl.load(outside_columns + k * X + x) - offset
            share = tl.load(outside_probs + rows * BX + x, mask=row_ok, other=0.0)
            p += tl.where((c == code)[None, :], share[:, None], 0.0)
    place = grads + rows[:, None] * WIDTH + (offset + c)[None, :]
    is_far = (tl.load(far + rows, mask=row_ok, other=0) != 0)[:, None]
    p = tl.where(is_far, tl.load(place, mask=used & is_far, other=0.0), p)
    label = tl.load(labels + rows, mask=row_ok, other=IGNORED)
    code = tl.load(codes + label * K + k, mask=(label != IGNORED) & (label >= 0), other=-1)
    at_label = c[None, :] == code[:, None]
    p = tl.where(at_label, 0.0, p)
    tl.store(place, tl.where(at_label, -tl.sum(p, axis=1)[:, None], p), mask=used)


@triton.jit
def fold_over_rows(
    e1t, e2_high, e2_low, e3, scale, ga_part, RP, S, STEPS,
    BR: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, EMULATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write A's gradient at one i.

    The products of each step are added up outside the tensor cores, which cut off where they add to float32: over
    thousands of rows that is 1e-5 of the gradient, always in the same direction.
    """
    i = tl.program_id(0)
    part = tl.program_id(1)
    j = tl.arange(0, BJ)
    c = tl.arange(0, BC)
    total = tl.zeros((BJ, BC), dtype=tl.float32)
    for start in tl.range(part * STEPS * BR, min((part + 1) * STEPS * BR, RP), BR, num_stages=STAGES):
        rows = start + tl.arange(0, BR)
        e3_RC = tl.load(e3 + rows[:, None] * BC + c[None, :]) * tl.load(scale + rows)[:, None]
        high_JR = tl.trans(tl.load(e2_high + rows[:, None] * BJ + j[None, :]))
        low_JR = tl.trans(tl.load(e2_low + rows[:, None] * BJ + j[None, :]))
        x = tl.load(e1t + i * RP + rows)[:, None] * e3_RC
        x_high = _high(x, EMULATE)
        total += _product(high_JR, low_JR, x_high, _low(x, x_high, EMULATE), True)
    cell = j[:, None] * BC + c[None, :]
    tl.store(ga_part + (part * S + i) * (BJ * BC) + cell, total)


@triton.jit
def collect_bias_gradient(
    ga_part, cell_of_token, bias, largest, grad_bias, N, CELLS, PARTS, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dlogZ/db_n = exp(b_n - max b) · dlogZ/dA at the token's cell; 0 for tokens outside the box."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = tl.load(cell_of_token + token, mask=token < N, other=-1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(ga_part + part * CELLS + cell, mask=cell >= 0, other=0.0)
    b = tl.load(bias + token, mask=token < N, other=0.0).to(tl.float64)
    weight = tl.exp(b - tl.load(largest).to(tl.float64)).to(tl.float32)
    tl.store(grad_bias + token, total * weight, mask=token < N)


@triton.jit
def add_far_rows_to_bias_gradient(
    scores, codes, offsets, bias, far, log_partition, grad_bias, N, R, K, WIDTH,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the probabilities of BLOCK tokens in the rows that underflow. Blocks of rows without one are skipped."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = token < N
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    found = 0
    for first in range(0, R, ROWS):
        rows = first + tl.arange(0, ROWS)
        here = tl.sum(tl.load(far + rows, mask=rows < R, other=0), axis=0)
        found += here
        if here > 0:
            for row in range(first, min(first + ROWS, R)):
                if tl.load(far + row) != 0:
                    logits = _logits(scores + row * WIDTH, codes, offsets, bias, token, ok, K, BLOCK, True)
                    total += tl.exp(logits - tl.load(log_partition + row))
    if found > 0:
        gradient = tl.load(grad_bias + token, mask=ok, other=0.0) + total.to(tl.float32)
        tl.store(grad_bias + token, gradient, mask=ok)
