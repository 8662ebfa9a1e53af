# SPDX-License-Identifier: Apache-2.0
"""Log-prob, entropy and exact KL of every row in one read of the logits."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import fake
from klq_kernels._results import TokenStats
from klq_kernels.token_stats import reference

OP = "token_stats"


@torch.no_grad()
def token_stats(
    logits: Tensor,
    actions: Tensor,
    *,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Per-token statistics for logging and rollouts; no gradient.

    logprobs = log pi(a_t|s_t)           entropy = -sum_a pi log pi
    ref_logprobs = log pi_b(a_t|s_t)     kl = sum_a pi (log pi - log pi_b)

    Terms with pi = 0 are 0, also where pi_b = 0 too; kl is +inf where pi > 0 meets pi_b = 0.

    Args:
        logits: [..., V]; ref_logits: [..., V] or None. Layout and dtypes as in `token_logprobs`.
        actions, mask, temperature, logit_softcap, backend: as in `token_logprobs`.

    Returns:
        TokenStats(logprobs, entropy, ref_logprobs, kl), each [...] float32 (float64 if an input
        is), nats, exactly 0 at inactive tokens; the last two are None without `ref_logits`.

    Raises:
        TypeError, ValueError, IndexError: as `token_logprobs`, before any work.
    """
    use = check.rows(OP, logits, actions, mask, ref_logits)
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, logits.device, check.wide(logits, ref_logits), backend)
    check.action_values(OP, actions, use, logits.shape[-1])
    if chosen == "reference":
        return reference.token_stats(
            logits,
            actions,
            ref_logits=ref_logits,
            mask=use,
            temperature=t,
            logit_softcap=logit_softcap,
        )
    out = operator(chosen, OP)(logits, actions, ref_logits, use, t, cap)
    return TokenStats(*out) if ref_logits is not None else TokenStats(*out[:2], None, None)


@fake("token_stats")
def _(logits, actions, ref_logits, mask, temperature, softcap):
    wide = check.wide(logits, ref_logits)
    shapes = [actions.shape] * 2 + [actions.shape if ref_logits is not None else (0,)] * 2
    return tuple(logits.new_empty(shape, dtype=wide) for shape in shapes)
