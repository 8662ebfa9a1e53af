# SPDX-License-Identifier: Apache-2.0
"""LM head, then the KLQ loss, in plain PyTorch; autograd differentiates it."""

import torch
from torch import Tensor

from klq_kernels._results import KLQLoss, KLQStats
from klq_kernels._tensor_parallel import Shard
from klq_kernels.klq_loss.reference import squared_residuals
from klq_kernels.linear_token_logprobs.reference import (
    linear_token_logprobs,
    poisoned,
    too_few,
)


def linear_klq_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logprobs: Tensor,
    returns: Tensor,
    tau: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    num_active: int | None = None,
    shard: Shard | None = None,
) -> KLQLoss:
    """klq_loss(hidden @ weight.T + bias, ...); NaN where `num_active` is too small."""
    logprobs = linear_token_logprobs(
        hidden,
        weight,
        actions,
        bias=bias,
        mask=mask,
        temperature=temperature,
        logit_softcap=logit_softcap,
        logits_dtype=logits_dtype,
        num_active=num_active,
        shard=shard,
    )
    few = too_few(mask, actions.numel(), num_active)
    loss, stats = squared_residuals(
        logprobs,
        poisoned(values, few),
        ref_logprobs=ref_logprobs,
        returns=returns,
        tau=tau,
        mask=mask,
        weights=weights,
        normalizer=normalizer,
    )
    return KLQLoss(poisoned(loss, few), KLQStats(*(poisoned(s, few) for s in stats)))
