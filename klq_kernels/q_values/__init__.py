# SPDX-License-Identifier: Apache-2.0
"""Full-vocabulary action values, eq. (13)."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import fake
from klq_kernels.q_values import reference

OP = "q_values"


@torch.no_grad()
def q_values(
    logits: Tensor,
    ref_logits: Tensor,
    values: Tensor,
    *,
    tau: float,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Action value of every token of the vocabulary; no gradient.

    Q(s, .) = tau (log pi(.|s) - log pi_b(.|s)) + V(s)      (13)

    Its Boltzmann value `boltzmann_values(Q)` is V(s) and its Boltzmann policy pi_b e^{(Q-V)/tau}
    is pi, both exactly.

    Args:
        logits, ref_logits: [..., V], policy and reference; layout and dtypes as in
            `token_logprobs`.
        values: [...], V(s).
        tau: KL coefficient, >= 0.
        temperature, logit_softcap, backend: as in `token_logprobs`.

    Returns:
        [..., V] float32 (float64 if an input is), in units of reward; -inf where pi = 0 (also
        where pi_b = 0 too), +inf where only pi_b = 0.

    Raises:
        TypeError, ValueError: before any work.

    Source: eq. (13), arXiv 2508.17000.
    """
    check.logits(OP, "logits", logits)
    check.logits(OP, "ref_logits", ref_logits)
    check.has_shape(OP, "ref_logits", ref_logits, logits.shape, "logits")
    check.per_token(OP, "values", values, logits.shape[:-1], "logits without V")
    check.same_device(OP, logits.device, ref_logits=ref_logits, values=values)
    tau = check.tau(OP, tau)
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, logits.device, check.wide(logits, ref_logits, values), backend)
    if chosen == "reference":
        return reference.q_values(
            logits, ref_logits, values, tau=tau, temperature=t, logit_softcap=logit_softcap
        )
    return operator(chosen, OP)(logits, ref_logits, values, tau, t, cap)


@fake("q_values")
def _(logits, ref_logits, values, tau, temperature, softcap):
    wide = check.wide(logits, ref_logits, values)
    return logits.new_empty(logits.shape, dtype=wide)
