# SPDX-License-Identifier: Apache-2.0
"""Boltzmann state values in Triton: log pi_b's normaliser in one read of the reference, then one
online log-sum-exp of log pi_b + q / tau (the reference from L2)."""

import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton as tt
from klq_kernels._triton import absorb, lanes_meet, load_tile, row_at, row_target, scaled, wide

_INF = tl.constexpr(float("inf"))
_STAGES = 2


@triton.jit
def term(x, y, mb, log_sb, inverse_tau, inverse_t, cap, KIND: tl.constexpr):
    """log pi_b + q / tau; -inf where q = -inf or pi_b = 0: such terms are skipped."""
    q = x.to(tl.float32)
    zb = scaled(y, inverse_t, cap, KIND)
    sum = ((zb - mb) - log_sb) + q * inverse_tau
    return tl.where((q == -_INF) | (zb == -_INF), -_INF, sum)


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
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = row_at(q, i, inner, near, far, UNIT)
    ref = row_at(ref_logits, i, ref_inner, ref_near, ref_far, REF_UNIT)
    no = tl.full([], -1, tl.int32)
    mb, sb, _z, _x = row_target(
        ref, width, no < 0, no, no >= 0, inverse_t, cap, KIND, R, C, STAGES, "evict_last"
    )
    log_sb = tl.log(sb.to(tl.float64)).to(tl.float32)
    m = tl.full([C], -_INF, tl.float32)
    s = tl.zeros([C], tl.float32)
    nan = tl.zeros([C], tl.int32)
    infinite = tl.zeros([C], tl.int32)
    whole = width // (R * C)
    for t in tl.range(0, whole, num_stages=STAGES):
        x, _col = load_tile(row, t, width, R, C, False, "")
        y, _col = load_tile(ref, t, width, R, C, False, "evict_first")
        z = term(x, y, mb, log_sb, inverse_tau, inverse_t, cap, KIND)
        nan = tl.maximum(nan, tl.max((z != z).to(tl.int32), 0))
        infinite = tl.maximum(infinite, tl.max((z == _INF).to(tl.int32), 0))
        m, s = absorb(m, s, tl.where(z == _INF, -_INF, z), z == _INF)
    for t in range(whole, tl.cdiv(width, R * C)):
        x, _col = load_tile(row, t, width, R, C, True, "")
        y, _col = load_tile(ref, t, width, R, C, True, "evict_first")
        z = term(x, y, mb, log_sb, inverse_tau, inverse_t, cap, KIND)
        nan = tl.maximum(nan, tl.max((z != z).to(tl.int32), 0))
        infinite = tl.maximum(infinite, tl.max((z == _INF).to(tl.int32), 0))
        m, s = absorb(m, s, tl.where(z == _INF, -_INF, z), z == _INF)
    top, total = lanes_meet(m, s)
    v = wide(tau) * (top.to(tl.float64) + tl.log(total))
    v = tl.where(top == -_INF, -_INF, v.to(tl.float32))
    v = tl.where(tl.max(infinite, 0) > 0, _INF, v)
    tl.store(out + i, tl.where(tl.max(nan, 0) > 0, float("nan"), v))


def boltzmann_values(
    q: Tensor, ref_logits: Tensor, tau: float, temperature: float, softcap: float
) -> Tensor:
    width = q.shape[-1]
    out = tt.like(q, q.shape[:-1])
    inverse_t, cap, kind = tt.scaling(temperature, softcap)
    inner, near, far, unit = tt.rows_of(q)
    ref_inner, ref_near, ref_far, ref_unit = tt.rows_of(ref_logits)
    r, c, warps = tt.tile(width, kind, 8, 2)
    tt.launch(
        boltzmann_values_kernel,
        out.numel(),
        q,
        *(q, ref_logits, out, width, inner, near, far, ref_inner, ref_near, ref_far),
        *(tau, 1.0 / tau, inverse_t, cap, unit, ref_unit, kind, r, c, _STAGES),
        num_warps=warps,
    )
    return out
