# SPDX-License-Identifier: Apache-2.0
"""Logits to lambda-returns in plain PyTorch."""

import torch
from torch import Tensor

from klq_kernels._checks import wide
from klq_kernels._results import KLQTargets
from klq_kernels.lambda_returns.reference import lambda_returns
from klq_kernels.token_logprobs.reference import token_logprobs


@torch.no_grad()
def klq_targets(
    logits: Tensor,
    actions: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    tau: float,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> KLQTargets:
    """token_logprobs of both models, then lambda_returns of their difference."""
    if cu_seqlens is not None:  # tokens past the last sequence are inactive
        inside = torch.arange(values.shape[0], device=values.device) < cu_seqlens[-1]
        mask = inside if mask is None else mask & inside
    scaling = {"mask": mask, "temperature": temperature, "logit_softcap": logit_softcap}
    rows_lam = lam if isinstance(lam, Tensor) else None
    dtype = wide(logits, values, rewards, ref_logits, ref_logprobs, rows_lam, bootstrap)
    logprobs = token_logprobs(logits.to(dtype), actions, **scaling)
    if ref_logits is not None:
        ref_logprobs = token_logprobs(ref_logits.to(dtype), actions, **scaling)
    else:
        ref_logprobs = ref_logprobs.to(dtype)
        if mask is not None:
            ref_logprobs = torch.where(mask, ref_logprobs, 0.0)
    log_ratios = logprobs - ref_logprobs
    targets = lambda_returns(
        log_ratios,
        values.to(dtype),
        rewards,
        tau=tau,
        gamma=gamma,
        lam=lam,
        alpha=alpha,
        mask=mask,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
    )
    return KLQTargets(logprobs, ref_logprobs, log_ratios, *targets)
