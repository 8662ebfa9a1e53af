# SPDX-License-Identifier: Apache-2.0
"""The KLQ loss in Triton: log-prob, residual and gradient of a row while it is in L2.

A program reads its row once for the log-prob; with it the residual, and so the coefficient of the
gradient, is known, and a second read (from L2) writes the gradient. Per-row terms go to scratch in
float64 and one program adds them up in a fixed order: the same bits on every run, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels._triton import (
    column,
    cut,
    edge_tile,
    factor_of,
    inner_tile,
    is_active,
    load_tile,
    logprob_of,
    row_at,
    row_target,
    store_tile,
    wide,
)
from klq_kernels.token_logprobs.triton import gradient_factors, write_gradient

# Rows whose second read shall hit L2: with two 16-warp programs an SM, one reading while the other
# writes, 264 rows of 256 KiB are half read or half written, of which the H200's 60 MB hold what is
# still to be read; short rows fit anyway and gain from more, smaller programs.
_LONG_ROW = 160 << 10


@triton.jit
def normalizer(norm, count, COUNTED: tl.constexpr):
    """What the loss is divided by: given, or the number of active tokens (at least 1)."""
    n = tl.load(norm).to(tl.float64) if norm is not None else wide(count)
    return tl.maximum(n, 1.0) if COUNTED else n


@triton.jit
def power_of_two(k):
    """2^k as float32, k in [-126, 127]."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def half_shift(coefficient, inverse_t):
    """Rule 13: the power of two that brings a float16 gradient's coefficient to about 2^14, so that
    nothing flushes to zero before the loss scale is known; 0 where the coefficient is 0 or not
    finite."""
    largest = tl.abs(coefficient.to(tl.float32)) * tl.maximum(inverse_t, 1.0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    shift = tl.minimum(tl.maximum(14 - exponent, -100), 100)
    finite = (largest < float("inf")) & (coefficient != 0)  # NaN is neither
    return tl.where(finite, shift, 0)


@triton.jit(do_not_specialize=["inner", "out_inner", "count"])
def klq_loss_kernel(
    logits,
    actions,
    values,
    ref_logprobs,
    returns,
    mask,  # None: all active
    weights,  # None: 1
    norm,  # 0-d tensor, or None: `count`
    terms,  # [2, rows] float64: residual, log-prob
    dlogits,  # None: no gradients; may be `logits`
    dvalues,
    unscale,  # [rows] for float16 gradients, else None
    rows,
    count,
    width,
    inner,
    near,
    far,
    out_inner,
    out_near,
    out_far,
    tau,
    inverse_t,
    cap,
    COUNTED: tl.constexpr,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    KIND: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    active = is_active(mask, i)
    action, here = column(tl.load(actions + i).to(tl.int64), width)
    row = row_at(logits, i, inner, near, far, UNIT)
    KEEP: tl.constexpr = "" if dlogits is None else "evict_last"
    top, rest, y_a, x_a = row_target(
        row, width, active, action, here, inverse_t, cap, KIND, R, L, V, KEEP
    )
    logprob = logprob_of(top, rest, y_a, here, inverse_t)
    ref = tl.load(ref_logprobs + i, mask=active, other=0.0).to(tl.float64)
    v = tl.load(values + i, mask=active, other=0.0).to(tl.float64)
    g = tl.load(returns + i, mask=active, other=0.0).to(tl.float64)
    residual = wide(tau) * (logprob - ref) + v - g
    tl.store(terms + i, tl.where(active, residual, 0.0))
    tl.store(terms + rows + i, tl.where(active, logprob, 0.0))
    if dlogits is not None:
        dq = 2.0 * residual / normalizer(norm, count, COUNTED)
        if weights is not None:
            dq = dq * tl.load(weights + i, mask=active, other=0.0).to(tl.float64)
        tl.store(dvalues + i, tl.where(active, dq.to(tl.float32), 0.0))
        coefficient = wide(tau) * dq
        if unscale is not None:
            shift = tl.where(active, half_shift(coefficient, inverse_t), 0)
            coefficient = coefficient * power_of_two(shift).to(tl.float64)
            tl.store(unscale + i, power_of_two(-shift))
        e_a = tl.exp2((y_a - top) * factor_of(inverse_t))
        share, chosen, plain = gradient_factors(
            coefficient, top, rest, e_a, x_a, inverse_t, cap, KIND
        )
        to = row_at(dlogits, i, out_inner, out_near, out_far, OUT_UNIT)
        TILE: tl.constexpr = R * L * V
        hit, whole, fast, tiles = cut(width, action, active & plain, TILE)
        for t in range(0, fast):
            write_gradient(
                row, to, inner_tile(t, hit), width, action, top, share, chosen, inverse_t, cap,
                KIND, TILE, False, False,
            )  # fmt: skip
        for t in range(fast, tiles):
            write_gradient(
                row, to, edge_tile(t, hit, whole), width, action, top, share, chosen, inverse_t,
                cap, KIND, TILE, True, False,
            )  # fmt: skip
        if not active:
            zero, col = tl.zeros([TILE], tl.float32), tl.arange(0, TILE)
            for t in range(0, tl.cdiv(width, TILE)):
                store_tile(to, t, col, width, zero, TILE, True)
        elif not plain:
            for t in range(0, tl.cdiv(width, TILE)):
                write_gradient(
                    row, to, t, width, action, top, share, chosen, inverse_t, cap, KIND, TILE,
                    True, True,
                )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "count"])
def klq_loss_sum_kernel(
    terms,
    values,
    mask,
    weights,
    norm,
    loss,
    stats,
    rows,
    count,
    COUNTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """loss and its four sums from the rows' terms: lanes over rows in order, then one tree."""
    squares = tl.zeros([TILE], tl.float64)
    total = tl.zeros([TILE], tl.float64)
    logprob_sum = tl.zeros([TILE], tl.float64)
    value_sum = tl.zeros([TILE], tl.float64)
    number = tl.zeros([TILE], tl.int64)
    for start in range(0, rows, TILE):
        i = start + tl.arange(0, TILE)
        active = i < rows
        if mask is not None:
            active = active & (tl.load(mask + i, mask=active, other=0) != 0)
        residual = tl.load(terms + i, mask=active, other=0.0)
        square = residual * residual
        squares += square
        if weights is not None:
            square = square * tl.load(weights + i, mask=active, other=0.0).to(tl.float64)
        total += square
        logprob_sum += tl.load(terms + rows + i, mask=active, other=0.0)
        value_sum += tl.load(values + i, mask=active, other=0.0).to(tl.float64)
        number += active.to(tl.int64)
    n = normalizer(norm, count, COUNTED)
    tl.store(loss, (tl.sum(total, 0) / n).to(tl.float32))
    tl.store(stats, tl.sum(squares, 0).to(tl.float32))
    tl.store(stats + 1, tl.sum(logprob_sum, 0).to(tl.float32))
    tl.store(stats + 2, tl.sum(value_sum, 0).to(tl.float32))
    tl.store(stats + 3, tl.sum(number, 0).to(tl.float32))


@triton.jit(do_not_specialize=["inner", "tiles"])
def klq_loss_backward_kernel(
    dlogits,
    unscale,  # None: 1
    upstream,
    tiles,  # a row
    width,
    inner,
    near,
    far,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """dlogits *= upstream unscale[row]; a factor of 1 touches nothing, and 0 stays 0 under an
    upstream that is not finite."""
    program = tl.program_id(0)
    i = (program // tiles).to(tl.int64)
    factor = tl.load(upstream).to(tl.float32)
    if unscale is not None:
        factor = factor * tl.load(unscale + i)
    if factor != 1.0:
        row = row_at(dlogits, i, inner, near, far, UNIT)
        begin, col = (program % tiles) * TILE, tl.arange(0, TILE)
        x = load_tile(row, program % tiles, col, width, TILE, True, "").to(tl.float32)
        x = tl.where(x == 0, 0.0, x * factor)
        tl.store(row + begin + col, x.to(dlogits.dtype.element_ty), mask=begin + col < width)


def run(
    logits: Tensor,
    actions: Tensor,
    values: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    tau: float,
    mask: Tensor | None,
    weights: Tensor | None,
    norm: Tensor | None,
    temperature: float,
    softcap: float,
    dlogits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats, dvalues, unscale), and the gradient in `dlogits` if it is given."""
    rows, width, grad = actions.numel(), logits.shape[-1], dlogits is not None
    half = grad and logits.dtype == torch.float16
    loss, stats = host.like(logits, ()), host.like(logits, 4)
    dvalues = host.like(logits, actions.shape if grad else (0,))
    unscale = host.like(logits, actions.shape if half else (0,))
    terms = host.like(logits, (2, rows), torch.float64)
    mask, values, weights = host.compact(mask), host.compact(values), host.compact(weights)
    counted = norm is None and mask is not None
    norm = mask.sum() if counted else norm
    inverse_t, cap, kind = host.scaling(temperature, softcap)
    inner, near, far, unit = host.rows_of(logits)
    out_inner, out_near, out_far, out_unit = host.rows_of(dlogits if grad else logits)
    long_row = grad and width * logits.element_size() > _LONG_ROW
    *tile, warps = host.tile(width, kind, 16 if long_row else 8, 2, logits.dtype)
    count = max(1, rows)
    host.launch(
        klq_loss_kernel,
        rows,
        logits,
        *(logits, host.compact(actions), values, host.compact(ref_logprobs), host.compact(returns)),
        *(mask, weights, norm, terms, dlogits, dvalues if grad else None),
        *(unscale if half else None, rows, count, width, inner, near, far),
        *(out_inner, out_near, out_far, tau, inverse_t, cap),
        *(counted, unit, out_unit, kind, *tile),
        num_warps=warps,
    )
    lanes = min(4096, max(16, host.power_of_2(rows)))
    host.launch(
        klq_loss_sum_kernel,
        1,
        logits,
        *(terms, values, mask, weights, norm, loss, stats, rows, count, counted, lanes),
        num_warps=max(1, lanes // 256),
    )
    return loss, stats, dvalues, unscale


def klq_loss(
    logits: Tensor, actions: Tensor, values: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *rest, need_grad = rest
    dlogits = host.like(logits, logits.shape, logits.dtype) if need_grad else None
    loss, stats, *small = run(logits, actions, values, *rest, dlogits)
    made = host.like(logits, 0, logits.dtype) if dlogits is None else dlogits
    return loss, stats, made, *small


def klq_loss_(
    logits: Tensor, actions: Tensor, values: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run(logits, actions, values, *rest, logits)


def klq_loss_backward_(dlogits: Tensor, unscale: Tensor, upstream: Tensor) -> None:
    width = dlogits.shape[-1]
    inner, near, far, unit = host.rows_of(dlogits)
    r, lanes, vector, warps = host.tile(width, 0, 8, 4, dlogits.dtype)
    size = r * lanes * vector
    tiles = host.tiles_of(width, size)
    host.launch(
        klq_loss_backward_kernel,
        dlogits.numel() // width * tiles,
        dlogits,
        *(dlogits, host.compact(unscale) if unscale.numel() else None, upstream),
        *(tiles, width, inner, near, far, unit, size),
        num_warps=warps,
    )
