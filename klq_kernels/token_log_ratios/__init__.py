# SPDX-License-Identifier: Apache-2.0
"""rho_t = log pi(a_t | s_t) - log pi_b(a_t | s_t) from the logits of both models."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._autograd import first_order
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import fake
from klq_kernels.token_log_ratios import reference

OP = "token_log_ratios"


def token_log_ratios(
    logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-ratio of policy and reference at the chosen tokens, formed in float32.

    rho_t = log pi_theta(a_t | s_t) - log pi_b(a_t | s_t)

    Temperature and soft-cap act on both alike. Identical logits give exactly 0, and swapping the
    two models negates the result.

    Args:
        logits: [..., V], policy; receives gradients. Layout and dtypes as in `token_logprobs`.
        ref_logits: [..., V], frozen reference; a constant. May have another dtype and layout.
        actions, mask, temperature, logit_softcap, backend: as in `token_logprobs`.

    Returns:
        [...], float32 (float64 if an input is), nats; exactly 0 at inactive tokens. A token
        banned by the policy gives -inf, by the reference +inf, by both NaN.

    Raises:
        TypeError, ValueError, IndexError: as `token_logprobs`, before any work.

    Source: the log-ratio in eq. (13), arXiv 2508.17000.
    """
    use = check.rows(OP, logits, actions, mask, ref_logits)
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, logits.device, check.wide(logits, ref_logits), backend)
    check.action_values(OP, actions, use, logits.shape[-1])
    if chosen == "reference":
        return reference.token_log_ratios(
            logits, ref_logits, actions, mask=use, temperature=t, logit_softcap=logit_softcap
        )
    return TokenLogRatios.apply(logits, ref_logits, actions, use, t, cap, chosen)


class TokenLogRatios(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, actions, mask, temperature, softcap, backend):
        log_ratios, row_stats = operator(backend, OP)(
            logits, ref_logits, actions, mask, temperature, softcap
        )
        ctx.save_for_backward(logits, actions, mask, row_stats)
        ctx.scaling = temperature, softcap
        ctx.backend = backend
        return log_ratios

    @staticmethod
    @first_order(OP)
    def backward(ctx, grad):
        logits, actions, mask, row_stats = ctx.saved_tensors
        dlogits = operator(ctx.backend, "token_logprobs_backward")(
            grad, logits, actions, mask, row_stats, *ctx.scaling
        )
        return dlogits, None, None, None, None, None, None


@fake("token_log_ratios")
def _(logits, ref_logits, actions, mask, temperature, softcap):
    wide = check.wide(logits, ref_logits)
    ratios = logits.new_empty(actions.shape, dtype=wide)
    return ratios, logits.new_empty((3, *actions.shape), dtype=wide)
