# SPDX-License-Identifier: Apache-2.0
"""Boltzmann state values of full-vocabulary action values."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import fake
from klq_kernels.boltzmann_values import reference

OP = "boltzmann_values"


@torch.no_grad()
def boltzmann_values(
    q: Tensor,
    ref_logits: Tensor,
    *,
    tau: float,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Soft value of an action-value row under the reference policy; no gradient.

    V(s) = tau log sum_a pi_b(a|s) exp(Q(s, a) / tau)

    Terms with Q = -inf or pi_b = 0 are skipped; with none left the value is -inf.

    Args:
        q: [..., V], float32, bfloat16, float16 (float64 on `reference` and `cpp`).
        ref_logits: [..., V]; layout and dtypes of both as in `token_logprobs`.
        tau: KL coefficient, > 0.
        temperature, logit_softcap: act on `ref_logits`, as in `token_logprobs`.
        backend: as in `token_logprobs`.

    Returns:
        [...] float32 (float64 if an input is), in units of reward.

    Raises:
        TypeError, ValueError: before any work.

    Source: the Boltzmann value under eq. (13), arXiv 2508.17000.
    """
    check.logits(OP, "q", q)
    check.logits(OP, "ref_logits", ref_logits)
    check.has_shape(OP, "q", q, ref_logits.shape, "ref_logits")
    check.same_device(OP, q.device, ref_logits=ref_logits)
    tau = check.tau(OP, tau, positive=True)
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, q.device, check.wide(q, ref_logits), backend)
    if chosen == "reference":
        return reference.boltzmann_values(
            q, ref_logits, tau=tau, temperature=t, logit_softcap=logit_softcap
        )
    return operator(chosen, OP)(q, ref_logits, tau, t, cap)


@fake("boltzmann_values")
def _(q, ref_logits, tau, temperature, softcap):
    return q.new_empty(q.shape[:-1], dtype=check.wide(q, ref_logits))
