# SPDX-License-Identifier: Apache-2.0
"""Log-probs of chosen tokens in Triton: one read of every row, of one model or of two.

The same kernel serves token_log_ratios and klq_targets, so that policy and reference meet the same
arithmetic and equal rows give a log-ratio of exactly 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels._triton import (
    capped,
    column,
    excess_of,
    factor_of,
    is_active,
    limit,
    load_tile,
    logprob_of,
    point_of,
    row_at,
    row_target,
    slope,
    store_tile,
    wide,
)

_INF = tl.constexpr(float("inf"))
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def stored_max(top, inverse_t, KIND: tl.constexpr):
    """A row's max as row_stats hold it, divided by T, and what the backward makes of that."""
    z = top * inverse_t
    return z, z / inverse_t if KIND else z


@triton.jit(do_not_specialize=["inner", "ref_inner", "sequences"])
def logprobs_kernel(
    logits,
    ref_logits,  # None: no second model
    actions,
    mask,  # None: all active
    ends,  # cu_seqlens, or None; rows past the last end are inactive
    cached,  # ref_logprobs in place of ref_logits, or None
    logprobs,
    ref_logprobs,
    log_ratios,
    row_stats,  # [3, rows]; outputs that are None are not wanted
    rows,
    sequences,
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
    if ends is not None:
        active = active & (i < tl.load(ends + sequences).to(tl.int64))
    action, here = column(tl.load(actions + i).to(tl.int64), width)
    row = row_at(logits, i, inner, near, far, UNIT)
    top, rest, y_a, _ = row_target(
        row, width, active, action, here, inverse_t, cap, KIND, R, L, V, ""
    )
    logprob = logprob_of(top, rest, y_a, here, inverse_t).to(tl.float32)
    if logprobs is not None:
        tl.store(logprobs + i, tl.where(active, logprob, 0.0))
    if row_stats is not None:
        at = row_stats + i
        z, back = stored_max(top, inverse_t, KIND)
        off = tl.where(tl.abs(z) < _INF, (top - back) * inverse_t, 0.0)
        tl.store(at, tl.where(active, z, 0.0))
        tl.store(at + rows, tl.where(active, rest * tl.exp(off), 0.0))
        tl.store(at + rows * 2, tl.where(active, y_a * inverse_t, 0.0))
    if log_ratios is not None:
        if cached is not None:
            ref = tl.load(cached + i, mask=active, other=0.0).to(tl.float32)
        else:
            row = row_at(ref_logits, i, ref_inner, ref_near, ref_far, REF_UNIT)
            top, rest, y_a, _ = row_target(
                row, width, active, action, here, inverse_t, cap, KIND, R, L, V, ""
            )
            ref = logprob_of(top, rest, y_a, here, inverse_t).to(tl.float32)
        # of the rounded log-probs: policy = reference gives exactly 0, cached or not
        tl.store(log_ratios + i, tl.where(active, logprob - ref, 0.0))
        if ref_logprobs is not None:
            tl.store(ref_logprobs + i, tl.where(active, ref, 0.0))


@triton.jit
def gradient_factors(coefficient, top, rest, e_a, x_a, inverse_t, cap, KIND: tl.constexpr):
    """What `write_gradient` needs of a row: the factor of 2^exponent, the chosen entry, and whether
    its fast form will do."""
    factor = factor_of(inverse_t)
    r = rest.to(tl.float64)
    share = coefficient * wide(inverse_t) / (r + e_a.to(tl.float64))
    chosen = (share * r).to(tl.float32)
    if KIND == 2:
        chosen = chosen * slope(x_a, cap)
    share = (-share * tl.exp2(-excess_of(top, factor)).to(tl.float64)).to(tl.float32)
    plain = (tl.abs(share) < _INF) & (tl.abs(top) <= limit(factor))
    return share, tl.where(x_a == -_INF, 0.0, chosen), plain


@triton.jit
def write_gradient(
    row,
    to,
    i,
    width,
    action,
    top,
    share,
    chosen,
    inverse_t,
    cap,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    EDGE: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """coefficient (onehot - softmax) dz/dlogits of tile i; `to` may be the row itself.

    EDGE: the tile may hold the chosen token or end past the row. CAREFUL: nor need products with
    the factor be finite, or the coefficient: banned tokens get 0 all the same.
    """
    factor = factor_of(inverse_t)
    col = tl.arange(0, TILE)
    x = load_tile(row, i, col, width, TILE, EDGE, "evict_first")
    y = capped(x, cap, KIND)
    t = (y - top) * factor if CAREFUL else tl.fma(y, factor, -point_of(top, factor))
    g = tl.exp2(t) * share
    if KIND == 2:
        g = g * slope(x.to(tl.float32), cap)
    if CAREFUL:
        g = tl.where(y == -_INF, 0.0, g)
    if EDGE:
        g = tl.where(col == action - i * TILE, chosen, g)
    store_tile(to, i, col, width, g, TILE, EDGE)


@triton.jit(do_not_specialize=["inner", "tiles"])
def backward_kernel(
    grad,
    logits,
    picked,  # the logits of the actions where `out` is `logits`, whose programs run in any order
    actions,
    mask,
    row_stats,
    out,
    rows,
    tiles,  # a row
    width,
    inner,
    near,
    far,
    inverse_t,
    cap,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    KIND: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
):
    program = tl.program_id(0)
    i = (program // tiles).to(tl.int64)
    t = program % tiles
    active = is_active(mask, i)
    action, _ = column(tl.load(actions + i).to(tl.int64), width)
    row = row_at(logits, i, inner, near, far, UNIT)
    to = row if picked is not None else out + i * (width // OUT_UNIT) * OUT_UNIT
    z = tl.load(row_stats + i)
    top = z / inverse_t if KIND else z
    rest = tl.load(row_stats + rows + i)
    if picked is None:
        x_a = tl.load(row + action, mask=active & (action >= 0), other=0.0).to(tl.float32)
    else:
        x_a = tl.load(picked + i).to(tl.float32)
    # of the logit itself where it is in this row, and not on another rank
    d = tl.where(action >= 0, capped(x_a, cap, KIND) - top, 0.0) * factor_of(inverse_t)
    z_a = tl.load(row_stats + rows * 2 + i)
    e_a = tl.exp2(tl.where(action >= 0, d, (z_a - z) * _LOG2E))
    upstream = tl.load(grad + i).to(tl.float64)
    share, chosen, plain = gradient_factors(upstream, top, rest, e_a, x_a, inverse_t, cap, KIND)
    TILE: tl.constexpr = R * L * V
    if not active:
        col = tl.arange(0, TILE)
        store_tile(to, t, col, width, tl.zeros([TILE], tl.float32), TILE, True)
    elif not plain:
        write_gradient(
            row, to, t, width, action, top, share, chosen, inverse_t, cap, KIND, TILE, True, True
        )
    elif (t == tl.maximum(action, 0) // TILE) | ((t + 1) * TILE > width):
        write_gradient(
            row, to, t, width, action, top, share, chosen, inverse_t, cap, KIND, TILE, True, False
        )
    else:
        write_gradient(
            row, to, t, width, action, top, share, chosen, inverse_t, cap, KIND, TILE, False, False
        )


def run(
    logits: Tensor,
    ref_logits: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
    *,
    cu_seqlens: Tensor | None = None,
    cached: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    log_ratios: Tensor | None = None,
    row_stats: Tensor | None = None,
) -> None:
    """Fills the outputs that are given."""
    width = logits.shape[-1]
    inverse_t, cap, kind = host.scaling(temperature, softcap)
    inner, near, far, unit = host.rows_of(logits)
    layout = (inner, near, far, unit) if ref_logits is None else host.rows_of(ref_logits)
    ref_inner, ref_near, ref_far, ref_unit = layout
    *tile, warps = host.tile(width, kind, 4, 4, logits.dtype)
    host.launch(
        logprobs_kernel,
        actions.numel(),
        logits,
        *(logits, ref_logits, host.compact(actions), host.compact(mask)),
        host.compact(cu_seqlens),
        *(host.compact(cached), logprobs, ref_logprobs, log_ratios, row_stats),
        *(actions.numel(), 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, width),
        *(inner, near, far, ref_inner, ref_near, ref_far, inverse_t, cap),
        *(unit, ref_unit, kind, *tile),
        num_warps=warps,
    )


def token_logprobs(
    logits: Tensor, actions: Tensor, mask: Tensor | None, temperature: float, softcap: float
) -> tuple[Tensor, Tensor]:
    logprobs = host.like(logits, actions.shape)
    row_stats = host.like(logits, (3, *actions.shape))
    run(
        logits,
        None,
        actions,
        mask,
        temperature,
        softcap,
        logprobs=logprobs,
        row_stats=row_stats,
    )
    return logprobs, row_stats


def token_logprobs_backward(
    grad: Tensor,
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    row_stats: Tensor,
    temperature: float,
    softcap: float,
) -> Tensor:
    out = host.like(logits, logits.shape, logits.dtype)
    run_backward(grad, logits, None, actions, mask, row_stats, temperature, softcap, out)
    return out


def token_logprobs_backward_(
    logits: Tensor,
    grad: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    row_stats: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    known = (actions >= 0) & (actions < logits.shape[-1])
    ids = torch.where(known, actions, 0).long().unsqueeze(-1)
    picked = logits.gather(-1, ids).squeeze(-1)
    run_backward(grad, logits, picked, actions, mask, row_stats, temperature, softcap, logits)


def run_backward(grad, logits, picked, actions, mask, row_stats, temperature, softcap, out):
    width = logits.shape[-1]
    inverse_t, cap, kind = host.scaling(temperature, softcap)
    inner, near, far, unit = host.rows_of(logits)
    r, lanes, vector, warps = host.tile(width, kind, 8, 4, logits.dtype)
    tiles = host.tiles_of(width, r * lanes * vector)
    host.launch(
        backward_kernel,
        actions.numel() * tiles,
        logits,
        *(
            host.compact(grad),
            logits,
            picked,
            host.compact(actions),
            host.compact(mask),
            host.compact(row_stats),
        ),
        *(out, actions.numel(), tiles, width, inner, near, far, inverse_t, cap),
        *(unit, 8 if width % 8 == 0 else 1, kind, r, lanes, vector),
        num_warps=warps,
    )
