# SPDX-License-Identifier: Apache-2.0
"""Log-prob, entropy and exact KL of every row in Triton, in one read of the logits.

Each lane carries the max m and, over all tokens but the chosen one, rest = sum e,
w = sum e (z - m) and k = sum e ((z - m) - (z_b - m_b)) with e = exp(z - m); when a max moves they
move with it. The chosen token's terms are added at the end.
"""

import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton as tt
from klq_kernels._triton import (
    column,
    finite_or_0,
    is_active,
    load_tile,
    log1p,
    logprob_of,
    row_at,
    scaled,
)

_INF = tl.constexpr(float("inf"))
_STAGES = 2


@triton.jit
def moved(total, s, factor, shift):
    """A sum of e (x - point) after the point moved by -shift; 0 where nothing of it is left."""
    return tl.where(factor == 0, 0.0, factor * (total + tl.where(s == 0, 0.0, s * shift)))


@triton.jit
def weighted(e, x):
    """Terms with pi = 0 are 0, whatever they are multiplied by."""
    return tl.sum(tl.where(e == 0, 0.0, e * x), 0)


@triton.jit
def take(
    m, rest, w, mb, restb, k, x, y, col, action, inverse_t, cap, KIND: tl.constexpr,
    KL: tl.constexpr,
):  # fmt: skip
    """The lanes' sums after one more tile: x of the policy, y of the reference."""
    z = scaled(x, inverse_t, cap, KIND)
    top = tl.maximum(m, tl.max(z, 0))
    point = finite_or_0(top)
    d = z - point[None, :]
    e = tl.where(col == action, 0.0, tl.exp(d))
    factor = tl.exp(m - point)
    shift = finite_or_0(m) - point
    if KL:
        zb = scaled(y, inverse_t, cap, KIND)
        topb = tl.maximum(mb, tl.max(zb, 0))
        pointb = finite_or_0(topb)
        db = zb - pointb[None, :]
        eb = tl.where(col == action, 0.0, tl.exp(db))
        restb = restb * tl.exp(mb - pointb) + tl.sum(eb, 0)
        k = moved(k, rest, factor, shift - (finite_or_0(mb) - pointb)) + weighted(e, d - db)
        mb = topb
    w = moved(w, rest, factor, shift) + weighted(e, d)
    rest = rest * factor + tl.sum(e, 0)
    return top, rest, w, mb, restb, k


@triton.jit
def meet(x):
    return tl.sum(x.to(tl.float64), 0)


@triton.jit
def chosen_term(e, x):
    return tl.where(e == 0, 0.0, e * x).to(tl.float64)


@triton.jit
def log_sum(top, rest, z_a):
    r = rest.to(tl.float64)
    return tl.where(z_a == top, log1p(r), tl.log(r + tl.exp(z_a - top).to(tl.float64)))


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
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    active = is_active(mask, i)
    action, here = column(tl.load(actions + i).to(tl.int64), width)
    row = row_at(logits, i, inner, near, far, UNIT)
    KL: tl.constexpr = ref_logits is not None
    other = row
    if KL:
        other = row_at(ref_logits, i, ref_inner, ref_near, ref_far, REF_UNIT)
    m = tl.full([C], -_INF, tl.float32)
    rest = tl.zeros([C], tl.float32)
    w, mb, restb, k = rest, m, rest, rest
    whole = tl.where(active, width // (R * C), 0)
    for t in tl.range(0, whole, num_stages=STAGES):
        x, col = load_tile(row, t, width, R, C, False, "")
        y = x
        if KL:
            y, _col = load_tile(other, t, width, R, C, False, "")
        m, rest, w, mb, restb, k = take(
            m, rest, w, mb, restb, k, x, y, col, action, inverse_t, cap, KIND, KL
        )
    for t in range(whole, tl.where(active, tl.cdiv(width, R * C), 0)):
        x, col = load_tile(row, t, width, R, C, True, "")
        y = x
        if KL:
            y, _col = load_tile(other, t, width, R, C, True, "")
        m, rest, w, mb, restb, k = take(
            m, rest, w, mb, restb, k, x, y, col, action, inverse_t, cap, KIND, KL
        )

    # the lanes meet: each moves to the row's max
    top = tl.max(m, 0)
    point = finite_or_0(top)
    factor = tl.exp(m - point)
    shift = finite_or_0(m) - point
    rest_row = meet(rest * factor).to(tl.float32)
    x_a = tl.load(row + action, mask=here & active, other=-_INF)
    z_a = scaled(x_a, inverse_t, cap, KIND)
    d_a = z_a - point
    e_a = tl.exp(d_a)
    total = rest_row.to(tl.float64) + e_a.to(tl.float64)
    log_s = log_sum(top, rest_row, z_a)
    w_row = meet(moved(w, rest, factor, shift)) + chosen_term(e_a, d_a)
    logprob = logprob_of(top, rest_row, z_a, here)
    tl.store(logprobs + i, tl.where(active, logprob.to(tl.float32), 0.0))
    h = log_s - w_row / total
    tl.store(entropy + i, tl.where(active, h.to(tl.float32), 0.0))
    if KL:
        topb = tl.max(mb, 0)
        pointb = finite_or_0(topb)
        restb_row = meet(restb * tl.exp(mb - pointb)).to(tl.float32)
        xb_a = tl.load(other + action, mask=here & active, other=-_INF)
        zb_a = scaled(xb_a, inverse_t, cap, KIND)
        log_sb = log_sum(topb, restb_row, zb_a)
        k_row = meet(moved(k, rest, factor, shift - (finite_or_0(mb) - pointb)))
        k_row += chosen_term(e_a, d_a - (zb_a - pointb))
        divergence = k_row / total - (log_s - log_sb)
        ref = logprob_of(topb, restb_row, zb_a, here)
        tl.store(ref_logprobs + i, tl.where(active, ref.to(tl.float32), 0.0))
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
    out = tuple(tt.like(logits, shape) for shape in shapes)
    inverse_t, cap, kind = tt.scaling(temperature, softcap)
    inner, near, far, unit = tt.rows_of(logits)
    layout = (inner, near, far, unit) if ref_logits is None else tt.rows_of(ref_logits)
    ref_inner, ref_near, ref_far, ref_unit = layout
    r, c, warps = tt.tile(logits.shape[-1], kind, 4, 1)
    tt.launch(
        token_stats_kernel,
        actions.numel(),
        logits,
        *(logits, ref_logits, tt.compact(actions), tt.compact(mask), *out),
        *(logits.shape[-1], inner, near, far, ref_inner, ref_near, ref_far, inverse_t, cap),
        *(unit, ref_unit, kind, r, c, _STAGES),
        num_warps=warps,
    )
    return out
