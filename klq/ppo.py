# SPDX-License-Identifier: Apache-2.0
"""The PPO baseline: what differs from KLQ once rollouts, kernels and loop are the same.

The KL term goes into the reward (r - tau * rho, the k1 estimate), advantages are GAE and, by
default, whitened over the batch; the policy loss is the clipped ratio, the value loss the clipped
square. Reductions and normaliser are those of KLQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klq.config import KLQConfig
from klq.data import Rows
from klq_kernels import gae, linear_token_logprobs


def ppo_advantages(
    log_ratios: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    mask: Tensor,
    bootstrap: Tensor | None,
    args: KLQConfig,
) -> Tensor:
    """GAE(gamma, lam) of rewards - tau * log_ratios; all [N, R] float32, 0 where inactive."""
    return gae(
        rewards - args.tau * log_ratios,
        values,
        gamma=args.gamma,
        lam=args.lam,
        mask=mask,
        bootstrap=bootstrap,
    ).advantages


def whitened(advantages: Tensor, mask: Tensor, reduce=lambda sums: sums) -> Tensor:
    """(A - mean) / std over the active tokens of all processes; unchanged if fewer than two.

    reduce: sums a tensor over processes. Inactive entries are 0.
    """
    chosen = torch.where(mask, advantages, 0.0)
    count = reduce(mask.sum().float())
    mean = reduce(chosen.sum()) / count.clamp(min=1)
    centred = torch.where(mask, advantages - mean, 0.0)
    variance = reduce(centred.pow(2).sum()) / (count - 1).clamp(min=1)
    return torch.where(count < 2, chosen, centred * torch.rsqrt(variance + 1e-8))


def ppo_objective(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    *,
    rows: Rows,
    normalizer: float,
    args: KLQConfig,
    temperature: float,
    logit_softcap: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss + vf_coef * clipped value loss, summed over active tokens / normalizer.

    Reads `old_logprobs`, `old_values`, `policy_advantages` (whitened or not) and `advantages`
    (never whitened: the value target is old_values + advantages) from `rows.stored`.
    """
    stored, mask = rows.stored, rows.mask
    logprobs = linear_token_logprobs(
        hidden,
        weight,
        rows.actions,
        bias=bias,
        mask=mask,
        temperature=temperature,
        logit_softcap=logit_softcap,
        num_active=rows.num_active,
    )
    log_ratio = torch.where(mask, logprobs - stored["old_logprobs"], 0.0)
    ratio, eps = log_ratio.exp(), args.cliprange
    advantages = stored["policy_advantages"]
    gain = torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - eps, 1 + eps))
    old, target = stored["old_values"], stored["old_values"] + stored["advantages"]
    near = old + (values - old).clamp(-args.cliprange_value, args.cliprange_value)
    value_loss = 0.5 * torch.maximum((values - target).pow(2), (near - target).pow(2))

    policy_sum = torch.where(mask, -gain, 0.0).sum()
    value_sum = torch.where(mask, value_loss, 0.0).sum()
    loss = (policy_sum + args.vf_coef * value_sum) / normalizer
    return loss, {
        "loss/policy_avg": policy_sum.detach(),
        "loss/value_avg": value_sum.detach(),
        "policy/clipfrac_avg": (mask & ((ratio - 1).abs() > eps)).sum().float(),
        "policy/approxkl_avg": 0.5 * log_ratio.detach().pow(2).sum(),
    }
