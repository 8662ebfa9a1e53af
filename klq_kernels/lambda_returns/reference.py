# SPDX-License-Identifier: Apache-2.0
"""The reverse recursion of eq. (7) as an eager loop over time: the oracle and the naive baseline.

It runs on A itself, line by line as the paper has it; the compiled kernels scan W = V + c A
instead, so the two are independent derivations of the same numbers.
"""

import torch
from torch import Tensor

from klq_kernels._checks import wide
from klq_kernels._results import LambdaReturns


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """For every packed token the sequence it belongs to, [N]; S past cu_seqlens[-1]."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), position, right=True) - 1


@torch.no_grad()
def lambda_returns(
    log_ratios: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    tau: float,
    gamma: float = 1.0,
    lam: float | Tensor | None = None,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    trace: Tensor | None = None,
) -> LambdaReturns:
    """Q (13), A and G (7) of every active token; see `klq_kernels.lambda_returns`."""
    rows_lam = lam if isinstance(lam, Tensor) else None
    dtype = wide(log_ratios, values, rewards, rows_lam, bootstrap, trace)
    shape, tokens = values.shape, values.shape[-1]
    active = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    rows = shape[:-1]
    lam = 0.95 if lam is None else lam
    lam = lam.to(dtype) if isinstance(lam, Tensor) else torch.full(rows, lam, dtype=dtype)
    lam = lam.to(values.device)

    if cu_seqlens is None:
        seed = torch.zeros(rows, dtype=dtype, device=values.device)
        seed = seed if bootstrap is None else bootstrap.to(dtype)
        lam = lam.unsqueeze(-1).expand(shape)
        v_next, last = seed, None
    else:
        # one extra slot: tokens past cu_seqlens[-1] form no sequence and are inactive
        count = cu_seqlens.shape[0] - 1
        ids = sequence_ids(cu_seqlens, tokens)
        active = active & (ids < count)
        seed = torch.zeros(count + 1, dtype=dtype, device=values.device)
        if bootstrap is not None:
            seed = torch.cat([bootstrap.to(dtype), seed[:1]])
        seed = seed[ids]
        lam = torch.cat([lam, lam.new_zeros(1)])[ids] if lam.dim() else lam.expand(shape)
        last = torch.ones_like(ids, dtype=torch.bool)
        last[:-1] = ids[1:] != ids[:-1]
        v_next = torch.zeros((), dtype=dtype, device=values.device)

    rho, v, r = (torch.where(active, x.to(dtype), 0.0) for x in (log_ratios, values, rewards))
    c = lam if trace is None else torch.where(active, trace.to(dtype), 0.0)
    q = torch.where(active, tau * rho + v, 0.0)  # (13)
    advantages = torch.zeros(shape, dtype=dtype, device=values.device)
    ca_next = torch.zeros_like(v_next)  # c_n A_n of the next active token n
    for t in range(tokens - 1, -1, -1):
        if last is not None:  # a new sequence begins (from the right): its own bootstrap, no trace
            v_next = torch.where(last[t], seed[t], v_next)
            ca_next = torch.where(last[t], 0.0, ca_next)
        delta = r[..., t] + gamma * v_next - q[..., t]  # (14)
        a_t = delta + gamma * ca_next  # (7)
        use = active[..., t]
        advantages[..., t] = torch.where(use, a_t, 0.0)
        v_next = torch.where(use, v[..., t], v_next)
        ca_next = torch.where(use, c[..., t] * a_t, ca_next)
    returns = torch.where(active, q + alpha * advantages, 0.0)
    return LambdaReturns(q, advantages, returns)
