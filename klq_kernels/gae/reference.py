# SPDX-License-Identifier: Apache-2.0
"""Generalised advantage estimation in plain PyTorch: the reverse recursion with Q = V."""

import torch
from torch import Tensor

from klq_kernels._results import GAE
from klq_kernels.lambda_returns.reference import lambda_returns


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> GAE:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; returns = A + V."""
    out = lambda_returns(
        torch.zeros_like(values),
        values,
        rewards,
        tau=0.0,
        gamma=gamma,
        lam=lam,
        mask=mask,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
    )
    return GAE(out.advantages, out.returns)
