# SPDX-License-Identifier: Apache-2.0
"""Log-probs of chosen tokens in Triton: one read of every row, of one model or of two.

The same kernel serves token_log_ratios and klq_targets, so that policy and reference meet the same
arithmetic and equal rows give a log-ratio of exactly 0.
"""

import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton as tt
from klq_kernels._triton import (
    column,
    gradient_factors,
    is_active,
    logprob_of,
    row_at,
    row_target,
    write_gradient,
)

_STAGES = 2  # tiles of a row in flight


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
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    active = is_active(mask, i)
    if ends is not None:
        active = active & (i < tl.load(ends + sequences).to(tl.int64))
    action, here = column(tl.load(actions + i).to(tl.int64), width)
    row = row_at(logits, i, inner, near, far, UNIT)
    top, rest, z_a, _ = row_target(
        row, width, active, action, here, inverse_t, cap, KIND, R, C, STAGES, ""
    )
    logprob = logprob_of(top, rest, z_a, here).to(tl.float32)
    if logprobs is not None:
        tl.store(logprobs + i, tl.where(active, logprob, 0.0))
    if row_stats is not None:
        at = row_stats + i
        tl.store(at, tl.where(active, top, 0.0))
        tl.store(at + rows, tl.where(active, rest, 0.0))
        tl.store(at + rows * 2, tl.where(active, z_a, 0.0))
    if log_ratios is not None:
        if cached is not None:
            ref = tl.load(cached + i, mask=active, other=0.0).to(tl.float32)
        else:
            row = row_at(ref_logits, i, ref_inner, ref_near, ref_far, REF_UNIT)
            top, rest, z_a, _ = row_target(
                row, width, active, action, here, inverse_t, cap, KIND, R, C, STAGES, ""
            )
            ref = logprob_of(top, rest, z_a, here).to(tl.float32)
        # of the rounded log-probs: policy = reference gives exactly 0, cached or not
        tl.store(log_ratios + i, tl.where(active, logprob - ref, 0.0))
        if ref_logprobs is not None:
            tl.store(ref_logprobs + i, tl.where(active, ref, 0.0))


@triton.jit(do_not_specialize=["inner", "tiles"])
def backward_kernel(
    grad,
    logits,
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
    C: tl.constexpr,
):
    program = tl.program_id(0)
    i = (program // tiles).to(tl.int64)
    t = program % tiles
    active = is_active(mask, i)
    action, _ = column(tl.load(actions + i).to(tl.int64), width)
    row = row_at(logits, i, inner, near, far, UNIT)
    to = out + i * (width // OUT_UNIT) * OUT_UNIT
    top = tl.load(row_stats + i)
    rest = tl.load(row_stats + rows + i)
    z_a = tl.load(row_stats + rows * 2 + i)
    x_a = tl.load(row + action, mask=active & (action >= 0), other=0.0).to(tl.float32)
    upstream = tl.load(grad + i).to(tl.float64)
    share, chosen = gradient_factors(upstream, top, rest, z_a, x_a, inverse_t, cap, KIND)
    if active & ((t + 1) * (R * C) <= width):
        write_gradient(
            row, to, t, width, active, action, top, share, chosen, inverse_t, cap, KIND, R, C, False
        )  # fmt: skip
    else:
        write_gradient(
            row, to, t, width, active, action, top, share, chosen, inverse_t, cap, KIND, R, C, True
        )  # fmt: skip


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
    inverse_t, cap, kind = tt.scaling(temperature, softcap)
    inner, near, far, unit = tt.rows_of(logits)
    layout = (inner, near, far, unit) if ref_logits is None else tt.rows_of(ref_logits)
    ref_inner, ref_near, ref_far, ref_unit = layout
    r, c, warps = tt.tile(width, kind, 4, 4)
    tt.launch(
        logprobs_kernel,
        actions.numel(),
        logits,
        *(logits, ref_logits, tt.compact(actions), tt.compact(mask)),
        tt.compact(cu_seqlens),
        *(tt.compact(cached), logprobs, ref_logprobs, log_ratios, row_stats),
        *(actions.numel(), 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, width),
        *(inner, near, far, ref_inner, ref_near, ref_far, inverse_t, cap),
        *(unit, ref_unit, kind, r, c, _STAGES),
        num_warps=warps,
    )


def token_logprobs(
    logits: Tensor, actions: Tensor, mask: Tensor | None, temperature: float, softcap: float
) -> tuple[Tensor, Tensor]:
    logprobs = tt.like(logits, actions.shape)
    row_stats = tt.like(logits, (3, *actions.shape))
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
    width = logits.shape[-1]
    out = tt.like(logits, logits.shape, logits.dtype)
    inverse_t, cap, kind = tt.scaling(temperature, softcap)
    inner, near, far, unit = tt.rows_of(logits)
    r, c, warps = tt.tile(width, kind, 8, 4)
    tiles = tt.tiles_of(width, r * c)
    tt.launch(
        backward_kernel,
        actions.numel() * tiles,
        logits,
        *(tt.compact(grad), logits, tt.compact(actions), tt.compact(mask), tt.compact(row_stats)),
        *(out, actions.numel(), tiles, width, inner, near, far, inverse_t, cap),
        *(unit, 8 if width % 8 == 0 else 1, kind, r, c),
        num_warps=warps,
    )
    return out
