# SPDX-License-Identifier: Apache-2.0
"""KLQ itself: advantages (eq. 7, 13, 14) and the loss (eq. 6), on the kernels.

With the log-probs and values of the measurement before the epochs written old, the residual is

    Q_theta - G = tau * (log pi_theta - log pi_old) + V_theta - (V_old + alpha A),

the same number as with log pi_ref and G, so the epochs need no reference policy: the loss is given
old_logprobs in place of ref_logprobs, and V_old + alpha A in place of G. `klq.ppo` has the same two
functions with the same arguments.
"""

from __future__ import annotations

from torch import Tensor

from klq.config import KLQConfig
from klq.data import Rows
from klq_kernels import TokenStats, lambda_returns, linear_klq_loss, linear_token_stats


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    *,
    rows: Rows,
    temperature: float,
    logit_softcap: float | None,
) -> tuple[TokenStats, Tensor | None]:
    """Log-probs and entropy of the response tokens, [B, R], and all values that were read."""
    stats = linear_token_stats(
        hidden[:, : rows.actions.shape[1]],  # without the state of a bootstrap value
        weight,
        rows.actions,
        bias=bias,
        mask=rows.mask,
        temperature=temperature,
        logit_softcap=logit_softcap,
        num_active=rows.num_active,
    )
    return stats, values


def klq_advantages(
    log_ratios: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    mask: Tensor,
    bootstrap: Tensor | None,
    args: KLQConfig,
) -> Tensor:
    """A of eq. (7), before alpha; all [N, R] float32, 0 where inactive."""
    return lambda_returns(
        log_ratios,
        values,
        rewards,
        tau=args.tau,
        gamma=args.gamma,
        lam=args.lam,
        mask=mask,
        bootstrap=bootstrap,
    ).advantages


def klq_objective(
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
    """Eq. (6) in its residual form: the sum over the active tokens of `rows` / normalizer.

    Reads `old_logprobs`, `old_values` and `advantages` from `rows.stored`.
    """
    stored = rows.stored
    loss, stats = linear_klq_loss(
        hidden,
        weight,
        rows.actions,
        values,
        bias=bias,
        ref_logprobs=stored["old_logprobs"],
        returns=stored["old_values"] + args.alpha * stored["advantages"],
        tau=args.tau,
        mask=rows.mask,
        normalizer=normalizer,
        temperature=temperature,
        logit_softcap=logit_softcap,
        num_active=rows.num_active,
    )
    return loss, {"residual_sq": stats.residual_sq}
