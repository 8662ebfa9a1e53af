# SPDX-License-Identifier: Apache-2.0
"""Boltzmann state values in Triton: log pi_b's normaliser in one read of the reference, then one
online log-sum-exp of log pi_b + q / tau (the reference from L2)."""

import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels._triton import (
    absorb,
    capped,
    factor_of,
    lane_max,
    lanes_meet,
    load_tile,
    row_at,
    row_target,
    wide,
)

_INF = tl.constexpr(float("inf"))


@triton.jit
def term(x, y, mb, log_sb, inverse_tau, inverse_t, cap, KIND: tl.constexpr):
    """log pi_b + q / tau; -inf where q = -inf or pi_b = 0: such terms are skipped. In a reference
    that is no distribution no pi_b is 0: its sum is NaN, and so is the term."""
    q = x.to(tl.float32)
    zb = capped(y, cap, KIND)
    sum = ((zb - mb) * inverse_t - log_sb) + q * inverse_tau
    sound = tl.where(log_sb == log_sb, zb, 0.0)
    return tl.where((q == -_INF) | (sound == -_INF), -_INF, sum)


@triton.jit(do_not_specialize=["inner", "ref_inner"])
def boltzmann_values_kernel(
    q,
    ref_logits,
    out,
    width,
    inner,
    near,
    far,
    ref_inner,
    ref_near,
    ref_far,
    tau,
    inverse_tau,
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
    row = row_at(q, i, inner, near, far, UNIT)
    ref = row_at(ref_logits, i, ref_inner, ref_near, ref_far, REF_UNIT)
    no = tl.full([], -1, tl.int32)
    mb, sb, _z, _x = row_target(
        ref, width, no < 0, no, no >= 0, inverse_t, cap, KIND, R, L, V, "evict_last"
    )
    log_sb = tl.log(sb.to(tl.float64)).to(tl.float32)
    TILE: tl.constexpr = R * L * V
    col = tl.arange(0, TILE)
    m = tl.full([L], -_INF, tl.float32)
    s = tl.zeros([L], tl.float32)
    largest = m
    whole = width // TILE
    for t in range(0, whole):
        x = load_tile(row, t, col, width, TILE, False, "")
        y = load_tile(ref, t, col, width, TILE, False, "evict_first")
        z = term(x, y, mb, log_sb, inverse_tau, inverse_t, cap, KIND)
        z = tl.reshape(z, [R, L, V])
        largest = tl.maximum(largest, lane_max(z))
        m, s = absorb(m, s, tl.where(z == _INF, -_INF, z), factor_of(1.0), True)
    for t in range(whole, tl.cdiv(width, TILE)):
        x = load_tile(row, t, col, width, TILE, True, "")
        y = load_tile(ref, t, col, width, TILE, True, "evict_first")
        z = term(x, y, mb, log_sb, inverse_tau, inverse_t, cap, KIND)
        z = tl.reshape(z, [R, L, V])
        largest = tl.maximum(largest, lane_max(z))
        m, s = absorb(m, s, tl.where(z == _INF, -_INF, z), factor_of(1.0), True)
    top, total = lanes_meet(m, s, factor_of(1.0), True)
    v = wide(tau) * (top.to(tl.float64) + tl.log(total.to(tl.float64)))
    v = tl.where((top == -_INF) & (total == 0), -_INF, v.to(tl.float32))
    v = tl.where((tl.max(largest, 0) == _INF) & (total == total), _INF, v)
    tl.store(out + i, v)  # NaN where any term is


def boltzmann_values(
    q: Tensor, ref_logits: Tensor, tau: float, temperature: float, softcap: float
) -> Tensor:
    width = q.shape[-1]
    out = host.like(q, q.shape[:-1])
    inverse_t, cap, kind = host.scaling(temperature, softcap)
    inner, near, far, unit = host.rows_of(q)
    ref_inner, ref_near, ref_far, ref_unit = host.rows_of(ref_logits)
    *tile, warps = host.tile(width, kind, 8, 2, q.dtype)
    host.launch(
        boltzmann_values_kernel,
        out.numel(),
        q,
        *(q, ref_logits, out, width, inner, near, far, ref_inner, ref_near, ref_far),
        *(tau, 1.0 / tau, inverse_t, cap, unit, ref_unit, kind, *tile),
        num_warps=warps,
    )
    return out
