# SPDX-License-Identifier: Apache-2.0
"""From logits to targets: log-probs of both models, log-ratios, Q, advantages, lambda-returns."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import fake
from klq_kernels._results import KLQTargets
from klq_kernels.klq_targets import reference

OP = "klq_targets"


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
    backend: str | None = None,
) -> KLQTargets:
    """Everything a KLQ batch needs, computed once per batch; no gradient.

    rho_t = log pi(a_t|s_t) - log pi_b(a_t|s_t), then Q, A and G as in `lambda_returns`.

    Args:
        logits: [..., T, V], or packed [N, V] with `cu_seqlens`; layout as in `token_logprobs`.
        actions, values, rewards: [..., T] or [N].
        ref_logits: [..., T, V], or ref_logprobs: [..., T] made with the same temperature and
            soft-cap; exactly one of the two.
        tau, gamma, lam, alpha, mask, cu_seqlens, bootstrap: as in `lambda_returns`.
        temperature, logit_softcap, backend: as in `token_logprobs`.

    Returns:
        KLQTargets(logprobs, ref_logprobs, log_ratios, q, advantages, returns), each of the shape
        of `actions`, float32 (float64 if an input is), exactly 0 at inactive tokens.

    Raises:
        TypeError, ValueError, IndexError: before any work.

    Source: eqs. (7), (13), (14), arXiv 2508.17000.
    """
    if (ref_logits is None) == (ref_logprobs is None):
        given = "both" if ref_logits is not None else "neither"
        raise ValueError(f"{OP}: exactly one of ref_logits and ref_logprobs is needed, got {given}")
    check.logits(OP, "logits", logits)
    shape = logits.shape[:-1]
    check.sequences(OP, cu_seqlens, shape)
    for name, x in (("values", values), ("rewards", rewards), ("ref_logprobs", ref_logprobs)):
        if x is not None:
            check.per_token(OP, name, x, shape, "logits without V")
    tau, gamma = check.tau(OP, tau), check.number(OP, "gamma", gamma, 0.0, 1.0)
    alpha = check.number(OP, "alpha", alpha, 0.0, 1.0, open_low=True)
    lam, lam_rows = check.trace_decay(OP, lam, shape, cu_seqlens)
    check.per_sequence(OP, "bootstrap", bootstrap, shape, cu_seqlens)
    use = check.rows(
        OP,
        logits,
        actions,
        mask,
        ref_logits,
        values=values,
        rewards=rewards,
        ref_logprobs=ref_logprobs,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
        lam=lam_rows,
    )
    t, cap = check.scaling(OP, temperature, logit_softcap)
    dtype = check.wide(logits, values, rewards, ref_logits, ref_logprobs, lam_rows, bootstrap)
    chosen = resolve(OP, logits.device, dtype, backend)
    check.action_values(OP, actions, _in_a_sequence(use, actions, cu_seqlens), logits.shape[-1])
    if chosen == "reference":
        return reference.klq_targets(
            logits,
            actions,
            values,
            rewards,
            ref_logits=ref_logits,
            ref_logprobs=ref_logprobs,
            tau=tau,
            gamma=gamma,
            lam=lam if lam_rows is None else lam_rows,
            alpha=alpha,
            mask=use,
            cu_seqlens=cu_seqlens,
            bootstrap=bootstrap,
            temperature=t,
            logit_softcap=logit_softcap,
        )
    return KLQTargets(
        *operator(chosen, OP)(
            logits,
            actions,
            values,
            rewards,
            ref_logits,
            ref_logprobs,
            tau,
            gamma,
            lam,
            lam_rows,
            alpha,
            use,
            cu_seqlens,
            bootstrap,
            t,
            cap,
        )
    )


def _in_a_sequence(use: Tensor | None, actions: Tensor, cu_seqlens: Tensor | None):
    """The tokens whose action ids must be valid; only worth forming where ids are looked at."""
    if cu_seqlens is None or not check.look_at_values(actions, cu_seqlens):
        return use
    inside = torch.arange(actions.shape[0], device=actions.device) < cu_seqlens[-1]
    return inside if use is None else use & inside


@fake("klq_targets")
def _(
    logits,
    actions,
    values,
    rewards,
    ref_logits,
    ref_logprobs,
    tau,
    gamma,
    lam,
    lam_rows,
    alpha,
    mask,
    cu_seqlens,
    bootstrap,
    temperature,
    softcap,
):
    dtype = check.wide(logits, values, rewards, ref_logits, ref_logprobs, lam_rows, bootstrap)
    return tuple(logits.new_empty(actions.shape, dtype=dtype) for _ in range(6))
