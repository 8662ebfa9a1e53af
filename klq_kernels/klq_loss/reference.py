# SPDX-License-Identifier: Apache-2.0
"""The KLQ loss in plain PyTorch; autograd differentiates it."""

import torch
from torch import Tensor

from klq_kernels._results import KLQLoss, KLQStats
from klq_kernels.token_logprobs.reference import token_logprobs


def squared_residuals(
    logprobs: Tensor,
    values: Tensor,
    *,
    ref_logprobs: Tensor,
    returns: Tensor,
    tau: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> KLQLoss:
    """Eq. (6) from token log-probs: sum_t w_t (tau (log pi - log pi_b) + V - G)^2 / normaliser."""
    use = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    dtype = logprobs.dtype

    def select(x: Tensor) -> Tensor:
        return torch.where(use, x.to(dtype), 0.0)

    ref_logprobs, returns = select(ref_logprobs.detach()), select(returns.detach())
    logprobs, values = select(logprobs), select(values)
    residual = tau * (logprobs - ref_logprobs) + values - returns
    weight = use.to(dtype) if weights is None else select(weights.detach())
    count = use.sum().to(dtype)
    n = count.clamp(min=1.0) if normalizer is None else normalizer
    loss = (weight * residual.square()).sum() / n
    stats = (residual.square().sum(), logprobs.sum(), values.sum(), count)
    return KLQLoss(loss, KLQStats(*(s.detach() for s in stats)))


def klq_loss(
    logits: Tensor,
    actions: Tensor,
    values: Tensor,
    *,
    ref_logprobs: Tensor,
    returns: Tensor,
    tau: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> KLQLoss:
    """Eq. (6) from logits; see `klq_kernels.klq_loss`."""
    logprobs = token_logprobs(
        logits, actions, mask=mask, temperature=temperature, logit_softcap=logit_softcap
    )
    return squared_residuals(
        logprobs,
        values,
        ref_logprobs=ref_logprobs,
        returns=returns,
        tau=tau,
        mask=mask,
        weights=weights,
        normalizer=normalizer,
    )
