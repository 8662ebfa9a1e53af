# SPDX-License-Identifier: Apache-2.0
"""LM head, then log-prob and entropy, in plain PyTorch."""

import torch
from torch import Tensor

from klq_kernels._results import TokenStats
from klq_kernels.linear_token_logprobs.reference import head_logits, poisoned, too_few
from klq_kernels.token_stats.reference import token_stats


@torch.no_grad()
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    num_active: int | None = None,
) -> TokenStats:
    """token_stats(hidden @ weight.T + bias, actions), without a reference."""
    stats = token_stats(
        head_logits(hidden, weight, bias, mask, logits_dtype),
        actions,
        mask=mask,
        temperature=temperature,
        logit_softcap=logit_softcap,
    )
    few = too_few(mask, actions.numel(), num_active)
    return TokenStats(*(poisoned(x, few) for x in stats[:2]), None, None)
