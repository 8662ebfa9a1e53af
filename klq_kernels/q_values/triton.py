# SPDX-License-Identifier: Apache-2.0
"""Full-vocabulary action values in Triton: both log-sums in one read, Q in a second from L2."""

import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels._triton import capped, load_tile, row_at, row_target

_INF = tl.constexpr(float("inf"))


@triton.jit
def q_tile(x, y, m, log_s, mb, log_sb, tau, v, inverse_t, cap, KIND: tl.constexpr):
    """Q = tau ((z - max - log S) - (z_b - max_b - log S_b)) + V, eq. (13); -inf where pi = 0."""
    z = capped(x, cap, KIND)
    zb = capped(y, cap, KIND)
    ratio = ((z - m) * inverse_t - log_s) - ((zb - mb) * inverse_t - log_sb)
    return tl.where(z == -_INF, -_INF, tau * ratio + v)


@triton.jit(do_not_specialize=["inner", "ref_inner"])
def q_values_kernel(
    logits,
    ref_logits,
    values,
    out,
    width,
    inner,
    near,
    far,
    ref_inner,
    ref_near,
    ref_far,
    tau,
    inverse_t,
    cap,
    UNIT: tl.constexpr,
    REF_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    KIND: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = row_at(logits, i, inner, near, far, UNIT)
    ref = row_at(ref_logits, i, ref_inner, ref_near, ref_far, REF_UNIT)
    no = tl.full([], -1, tl.int32)  # no token is left out of the sums
    m, s, _z, _x = row_target(
        row, width, no < 0, no, no >= 0, inverse_t, cap, KIND, R, L, V, "evict_last"
    )
    mb, sb, _z, _x = row_target(
        ref, width, no < 0, no, no >= 0, inverse_t, cap, KIND, R, L, V, "evict_last"
    )
    log_s = tl.log(s.to(tl.float64)).to(tl.float32)
    log_sb = tl.log(sb.to(tl.float64)).to(tl.float32)
    v = tl.load(values + i).to(tl.float32)
    to = out + i * (width // OUT_UNIT) * OUT_UNIT
    TILE: tl.constexpr = R * L * V
    col = tl.arange(0, TILE)
    whole = width // TILE
    for t in range(0, whole):
        x = load_tile(row, t, col, width, TILE, False, "evict_first")
        y = load_tile(ref, t, col, width, TILE, False, "evict_first")
        q = q_tile(x, y, m, log_s, mb, log_sb, tau, v, inverse_t, cap, KIND)
        tl.store(to + t * TILE + col, q, eviction_policy="evict_first")
    for t in range(whole, tl.cdiv(width, TILE)):
        x = load_tile(row, t, col, width, TILE, True, "evict_first")
        y = load_tile(ref, t, col, width, TILE, True, "evict_first")
        q = q_tile(x, y, m, log_s, mb, log_sb, tau, v, inverse_t, cap, KIND)
        tl.store(to + t * TILE + col, q, mask=t * TILE + col < width)


def q_values(
    logits: Tensor,
    ref_logits: Tensor,
    values: Tensor,
    tau: float,
    temperature: float,
    softcap: float,
) -> Tensor:
    width = logits.shape[-1]
    out = host.like(logits, logits.shape)
    inverse_t, cap, kind = host.scaling(temperature, softcap)
    inner, near, far, unit = host.rows_of(logits)
    ref_inner, ref_near, ref_far, ref_unit = host.rows_of(ref_logits)
    *tile, warps = host.tile(width, kind, 8, 2, logits.dtype)
    host.launch(
        q_values_kernel,
        values.numel(),
        logits,
        *(logits, ref_logits, host.compact(values), out, width, inner, near, far),
        *(ref_inner, ref_near, ref_far, tau, inverse_t, cap),
        *(unit, ref_unit, 8 if width % 8 == 0 else 1, kind, *tile),
        num_warps=warps,
    )
    return out
