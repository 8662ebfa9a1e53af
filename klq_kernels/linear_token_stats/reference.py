# SPDX-License-Identifier: Apache-2.0
"""LM head, then log-prob and entropy, in plain PyTorch."""

import torch
from torch import Tensor

from klq_kernels import _tensor_parallel as tp
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
    shard: tp.Shard | None = None,
) -> TokenStats:
    """token_stats(hidden @ weight.T + bias, actions), without a reference; weight and bias may be a
    rank's slice."""
    logits = head_logits(hidden, weight, bias, mask, logits_dtype)
    if shard is None:
        scaling = {"temperature": temperature, "logit_softcap": logit_softcap}
        stats = token_stats(logits, actions, mask=mask, **scaling)[:2]
    else:
        rest = mask, temperature, logit_softcap or 0.0, shard.group, "reference"
        stats = tp.stats(logits, shard.local(actions), *rest)
    few = too_few(mask, actions.numel(), num_active)
    return TokenStats(*(poisoned(x, few) for x in stats), None, None)
