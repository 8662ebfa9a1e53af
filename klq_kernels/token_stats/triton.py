# SPDX-License-Identifier: Apache-2.0
"""Log-prob, entropy and exact KL of every row in Triton, in one read of the logits.

With t the exponents in base 2 of a lane's elements and u those of the reference, each from its own
max, a lane carries the max and, over all tokens but the chosen one, rest = sum 2^t, w = sum 2^t t
and k = sum 2^t (t - u); when a max moves they move with it. The chosen token's terms are added at
the end.
"""

import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels._triton import (
    capped,
    column,
    cut,
    edge_tile,
    excess_of,
    exponent,
    exponents,
    factor_of,
    inner_tile,
    is_active,
    is_huge,
    lane_max,
    lane_sum,
    lanes_sum,
    load_tile,
    log_total,
    logprob_of,
    row_at,
    shift,
    with_chosen,
    without,
)

_INF = tl.constexpr(float("inf"))
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def take(
    m, rest, w, mb, restb, k, y, yb, factor, KL: tl.constexpr, CAREFUL: tl.constexpr
):  # fmt: skip
    """The lanes' sums after one more tile: y of the policy, yb of the reference."""
    top = tl.maximum(m, lane_max(y))
    t = exponents(y, top, factor, CAREFUL)
    e = tl.exp2(t)
    by = shift(m, top, factor, CAREFUL)
    f = tl.exp2(by)
    if KL:
        topb = tl.maximum(mb, lane_max(yb))
        u = exponents(yb, topb, factor, CAREFUL)
        byb = shift(mb, topb, factor, CAREFUL)
        # a sum may be infinite, and nothing of it left
        k = tl.where(f == 0, 0.0, f * tl.fma(by - byb, rest, k))
        k += lane_sum(tl.where(e == 0, 0.0, e * (t - u)))
        restb = restb * tl.exp2(byb) + lane_sum(tl.exp2(u))
        mb = topb
    w = f * tl.fma(by, rest, w) + lane_sum(e * tl.maximum(t, -16384.0))
    return top, rest * f + lane_sum(e), w, mb, restb, k


@triton.jit
def tiles_at(
    row, other, i, col, width, action, cap, KIND: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    V: tl.constexpr, KL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Tile i of both rows; without column `action` at an edge."""
    TILE: tl.constexpr = R * L * V
    y = capped(load_tile(row, i, col, width, TILE, EDGE, ""), cap, KIND)
    if EDGE:
        y = without(y, i, col, action, TILE)
    yb = y
    if KL:
        yb = capped(load_tile(other, i, col, width, TILE, EDGE, ""), cap, KIND)
        if EDGE:
            yb = without(yb, i, col, action, TILE)
    return tl.reshape(y, [R, L, V]), tl.reshape(yb, [R, L, V])


@triton.jit
def meet(m, rest, w, mb, restb, k, factor, CAREFUL: tl.constexpr):
    """The row's sums: the lanes move to the row's max."""
    top, topb = tl.max(m, 0), tl.max(mb, 0)
    by, byb = shift(m, top, factor, CAREFUL), shift(mb, topb, factor, CAREFUL)
    f = tl.exp2(by)
    k = lanes_sum(tl.where(f == 0, 0.0, f * tl.fma(by - byb, rest, k)))
    w = lanes_sum(f * tl.fma(by, rest, w))
    return top, lanes_sum(rest * f), w, topb, lanes_sum(restb * tl.exp2(byb)), k


@triton.jit
def excess(m, factor, huge):
    return tl.where(huge, 0.0, excess_of(m, factor))


@triton.jit
def fall(frm, to, factor, huge):
    return tl.where(huge, shift(frm, to, factor, True), shift(frm, to, factor, False))


@triton.jit(do_not_specialize=["inner", "ref_inner"])
def token_stats_kernel(
    logits,
    ref_logits,  # None: no reference
    actions,
    mask,  # None: all active
    logprobs,
    entropy,
    ref_logprobs,
    kl,
    width,
    inner,
    near,
    far,
    ref_inner,
    ref_near,
    ref_far,
    inverse_t,
    cap,
    UNIT: tl.constexpr,
    REF_UNIT: tl.constexpr,
    KIND: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    active = is_active(mask, i)
    action, here = column(tl.load(actions + i).to(tl.int64), width)
    row = row_at(logits, i, inner, near, far, UNIT)
    KL: tl.constexpr = ref_logits is not None
    other = row
    if KL:
        other = row_at(ref_logits, i, ref_inner, ref_near, ref_far, REF_UNIT)
    TILE: tl.constexpr = R * L * V
    col = tl.arange(0, TILE)
    factor = factor_of(inverse_t)
    hit, whole, fast, tiles = cut(width, action, active, TILE)
    m = tl.full([L], -_INF, tl.float32)
    rest = tl.zeros([L], tl.float32)
    w, mb, restb, k = rest, m, rest, rest
    for t in range(0, fast):
        y, yb = tiles_at(
            row, other, inner_tile(t, hit), col, width, action, cap, KIND, R, L, V, KL, False
        )
        m, rest, w, mb, restb, k = take(m, rest, w, mb, restb, k, y, yb, factor, KL, False)
    for t in range(fast, tiles):
        y, yb = tiles_at(
            row, other, edge_tile(t, hit, whole), col, width, action, cap, KIND, R, L, V, KL, True
        )
        m, rest, w, mb, restb, k = take(m, rest, w, mb, restb, k, y, yb, factor, KL, False)
    others, s, w_row, othersb, sb, k_row = meet(m, rest, w, mb, restb, k, factor, False)
    huge = is_huge(others, factor) | is_huge(othersb, factor)
    if huge:
        m = tl.full([L], -_INF, tl.float32)
        rest = tl.zeros([L], tl.float32)
        w, mb, restb, k = rest, m, rest, rest
        for t in range(0, tiles):
            y, yb = tiles_at(row, other, t, col, width, action, cap, KIND, R, L, V, KL, True)
            m, rest, w, mb, restb, k = take(m, rest, w, mb, restb, k, y, yb, factor, KL, True)
        others, s, w_row, othersb, sb, k_row = meet(m, rest, w, mb, restb, k, factor, True)

    x_a = tl.load(row + action, mask=here & active, other=-_INF)
    y_a = capped(x_a, cap, KIND)
    top, rest_row = with_chosen(others, s, y_a, factor, excess(others, factor, huge))
    logprob = logprob_of(top, rest_row, y_a, here, inverse_t)
    tl.store(logprobs + i, tl.where(active, logprob.to(tl.float32), 0.0))
    log_s = log_total(top, rest_row, y_a, inverse_t)
    by = fall(others, top, factor, huge)
    t_a = exponent(y_a, top, factor, huge)
    e_a = tl.exp2(t_a)
    f = tl.exp2(by)
    total = tl.where(f == 0, 0.0, f * s) + e_a
    mean = (f * tl.fma(by, s, w_row) + e_a * tl.maximum(t_a, -16384.0)) / total
    off = excess(top, factor, huge)
    h = log_s - ((mean - off) * _LN2).to(tl.float64)
    tl.store(entropy + i, tl.where(active, h.to(tl.float32), 0.0))
    if KL:
        xb_a = tl.load(other + action, mask=here & active, other=-_INF)
        yb_a = capped(xb_a, cap, KIND)
        topb, restb_row = with_chosen(othersb, sb, yb_a, factor, excess(othersb, factor, huge))
        ref = logprob_of(topb, restb_row, yb_a, here, inverse_t)
        tl.store(ref_logprobs + i, tl.where(active, ref.to(tl.float32), 0.0))
        log_sb = log_total(topb, restb_row, yb_a, inverse_t)
        byb = fall(othersb, topb, factor, huge)
        u_a = exponent(yb_a, topb, factor, huge)
        cross = tl.where(f == 0, 0.0, f * tl.fma(by - byb, s, k_row))
        cross = (cross + tl.where(e_a == 0, 0.0, e_a * (t_a - u_a))) / total
        offb = excess(topb, factor, huge)
        divergence = ((cross - (off - offb)) * _LN2).to(tl.float64) - (log_s - log_sb)
        tl.store(kl + i, tl.where(active, divergence.to(tl.float32), 0.0))


def token_stats(
    logits: Tensor,
    actions: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = [actions.shape] * 2 + [actions.shape if ref_logits is not None else (0,)] * 2
    out = tuple(host.like(logits, shape) for shape in shapes)
    inverse_t, cap, kind = host.scaling(temperature, softcap)
    inner, near, far, unit = host.rows_of(logits)
    layout = (inner, near, far, unit) if ref_logits is None else host.rows_of(ref_logits)
    ref_inner, ref_near, ref_far, ref_unit = layout
    *tile, warps = host.tile(logits.shape[-1], kind, 4, 2, logits.dtype)
    host.launch(
        token_stats_kernel,
        actions.numel(),
        logits,
        *(logits, ref_logits, host.compact(actions), host.compact(mask), *out),
        *(logits.shape[-1], inner, near, far, ref_inner, ref_near, ref_far, inverse_t, cap),
        *(unit, ref_unit, kind, *tile),
        num_warps=warps,
    )
    return out
