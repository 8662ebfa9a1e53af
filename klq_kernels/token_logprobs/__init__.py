# SPDX-License-Identifier: Apache-2.0
"""log pi(a_t | s_t) from logits: one read forward, one read and one write backward."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels import _tensor_parallel as tp
from klq_kernels._autograd import first_order
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import fake
from klq_kernels.token_logprobs import reference

OP = "token_logprobs"


def token_logprobs(
    logits: Tensor,
    actions: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    tp_group=None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of the token chosen in every state.

    log pi(a_t | s_t) = (z_a - max z) - log sum_j exp(z_j - max z),  z = c tanh(logits / c) / T

    both parts from the same rounding, so the result is never above 0.

    Args:
        logits: [..., V], float32, bfloat16, float16 (float64 on `reference` and `cpp`); unit stride
            over V and at most two leading strides, read where it lies. Receives gradients.
        actions: [...], integers: the token chosen at each row.
        mask: [...], bool or integers, nonzero = use. Inactive rows are not read; their result and
            their gradient are exactly 0 and their action may be anything.
        temperature: T > 0.
        logit_softcap: c > 0, or None.
        tp_group: (process group, vocab_start) when `logits` holds this rank's slice of the
            vocabulary, or the group alone for equal slices in rank order; actions are global ids.
        backend: overrides the choice that `klq_kernels.use_backend` describes.

    Returns:
        [...], float32 (float64 for float64 logits); in nats, <= 0. A banned token (logit -inf) has
        log-prob -inf and gradient 0; NaN for an active action outside [0, V) where ids are not
        checked (CUDA without KLQ_VALIDATE=1, and compiled graphs).

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or scalar, before any work.
        IndexError: an active action outside [0, V) (on the CPU, or with KLQ_VALIDATE=1).

    Source: the log pi_theta of eq. (13), arXiv 2508.17000.
    """
    use = check.rows(OP, logits, actions, mask)
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, logits.device, check.wide(logits), backend)
    if (tp_group := tp.several(OP, tp_group)) is not None:
        shard = tp.shard(tp_group, logits.shape[-1])
        check.action_values(OP, actions, use, shard.vocabulary)
        return tp.TokenLogprobs.apply(logits, shard.local(actions), use, t, cap, shard, chosen)
    check.action_values(OP, actions, use, logits.shape[-1])
    if chosen == "reference":
        return reference.token_logprobs(
            logits, actions, mask=use, temperature=t, logit_softcap=logit_softcap
        )
    return TokenLogprobs.apply(logits, actions, use, t, cap, chosen)


class TokenLogprobs(torch.autograd.Function):
    """Saves the logits and three numbers a row: (max, sum without the target's term, z_a)."""

    @staticmethod
    def forward(ctx, logits, actions, mask, temperature, softcap, backend):
        logprobs, row_stats = operator(backend, OP)(logits, actions, mask, temperature, softcap)
        ctx.save_for_backward(logits, actions, mask, row_stats)
        ctx.scaling = temperature, softcap
        ctx.backend = backend
        return logprobs

    @staticmethod
    @first_order(OP)
    def backward(ctx, grad):
        logits, actions, mask, row_stats = ctx.saved_tensors
        dlogits = operator(ctx.backend, f"{OP}_backward")(
            grad, logits, actions, mask, row_stats, *ctx.scaling
        )
        return dlogits, None, None, None, None, None


@fake("token_logprobs")
def _(logits, actions, mask, temperature, softcap):
    wide = check.wide(logits)
    logprobs = logits.new_empty(actions.shape, dtype=wide)
    return logprobs, logits.new_empty((3, *actions.shape), dtype=wide)


@fake("token_logprobs_backward")
def _(grad, logits, actions, mask, row_stats, temperature, softcap):
    return logits.new_empty(logits.shape)


@fake("token_logprobs_backward_")
def _(logits, grad, actions, mask, row_stats, temperature, softcap):
    return None
