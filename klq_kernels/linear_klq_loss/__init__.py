# SPDX-License-Identifier: Apache-2.0
"""Hidden states to the KLQ loss through the LM head: gradients leave the forward."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels import _linear as linear
from klq_kernels import _tensor_parallel as tp
from klq_kernels._autograd import first_order, times
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import composite, composite_fake
from klq_kernels._results import KLQLoss, KLQStats
from klq_kernels.klq_loss.reference import squared_residuals
from klq_kernels.linear_klq_loss import reference
from klq_kernels.linear_token_logprobs import sharded

OP = "linear_klq_loss"


def linear_klq_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logprobs: Tensor,
    returns: Tensor,
    tau: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    num_active: int | None = None,
    chunk_bytes: int | None = None,
    tp_group=None,
    backend: str | None = None,
) -> KLQLoss:
    """klq_loss(hidden @ weight.T + bias, ...): the LM head and eq. (6) in one op.

    The targets are known before the head runs, so loss and gradients of hidden, weight, bias and
    values are made chunk by chunk in the forward (6 N D V operations, no recomputation). dW is
    accumulated in float32. The loss serves one backward; a second raises.

    Args:
        hidden: [..., D]; weight: [V, D]; bias: [V] or None, as in `linear_token_logprobs`. They and
            `values` receive gradients.
        actions, values, ref_logprobs, returns, tau, mask, weights, normalizer, temperature,
            logit_softcap: as in `klq_loss`.
        logits_dtype, num_active, chunk_bytes, tp_group: as in `linear_token_logprobs`; too small a
            num_active gives a NaN loss.
        backend: as in `token_logprobs`.

    Returns:
        KLQLoss(loss, stats): float32 0-d loss (float64 for float64 inputs) and detached sums.

    Raises:
        TypeError, ValueError, IndexError: before any work.

    Source: eq. (6), arXiv 2508.17000 (no factor 1/2).
    """
    weight, tp_group = tp.unwrap(OP, weight, tp_group)
    hidden, weight, bias = linear.autocast(OP, hidden, weight, bias)
    use = linear.inputs(
        OP,
        hidden,
        weight,
        bias,
        actions,
        mask,
        num_active,
        chunk_bytes,
        logits_dtype,
        values=values,
        ref_logprobs=ref_logprobs,
        returns=returns,
        weights=weights,
        normalizer=normalizer,
    )
    check.loss_inputs(OP, actions.shape, values, ref_logprobs, returns, weights, normalizer)
    tau = check.tau(OP, tau)
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, hidden.device, check.wide(hidden), backend)
    rest = {
        "ref_logprobs": ref_logprobs,
        "returns": returns,
        "tau": tau,
        "mask": use,
        "weights": weights,
        "normalizer": check.as_tensor(normalizer, hidden),
    }
    if (tp_group := tp.several(OP, tp_group)) is not None:
        logprobs = sharded(
            *(OP, hidden, weight, bias, actions, use, t, cap),
            *(logits_dtype, num_active, tp_group, chosen),
        )
        return squared_residuals(logprobs, values, **rest)
    check.action_values(OP, actions, use, weight.shape[0])
    if chosen == "reference":
        return reference.linear_klq_loss(
            hidden,
            weight,
            actions,
            values,
            bias=bias,
            **rest,
            temperature=t,
            logit_softcap=logit_softcap,
            logits_dtype=logits_dtype,
            num_active=num_active,
        )

    heads = hidden, weight, bias

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().reshape(-1)

    loss, stats = LinearLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        values.reshape(-1),
        flat(actions),
        flat(ref_logprobs),
        flat(returns),
        tau,
        flat(use),
        flat(weights),
        rest["normalizer"],
        t,
        cap,
        logits_dtype,
        num_active,
        chunk_bytes,
        *(torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads),
        chosen,
    )
    return KLQLoss(loss, KLQStats(*stats.unbind(0)))


class LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, values, *rest):
        *rest, backend = rest
        loss, stats, *made = operator(backend, OP)(hidden, weight, bias, values, *rest)
        ctx.mark_non_differentiable(stats)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, values)]
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*made)
        else:
            ctx.made = made
        return loss, stats

    @staticmethod
    @first_order(OP)
    def backward(ctx, upstream, *_):
        if torch.compiler.is_compiling():
            made = ctx.saved_tensors
        elif ctx.made is None:
            raise RuntimeError(
                f"{OP}: the gradients made in the forward were handed to the first backward; a "
                "second one needs a new call"
            )
        else:
            made, ctx.made = ctx.made, None
        grads = [
            times(g, upstream).to(dtype) if need else None
            for g, dtype, need in zip(made, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return *grads, *(None,) * 16


@composite(
    OP,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor values, Tensor actions, "
    "Tensor ref_logprobs, Tensor returns, float tau, Tensor? mask, Tensor? weights, "
    "Tensor? normalizer, float temperature, float softcap, ScalarType? logits_dtype, "
    "SymInt? num_active, int? chunk_bytes, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@linear.keeps_dtypes
def _forward(
    backend,
    hidden,
    weight,
    bias,
    values,
    actions,
    ref_logprobs,
    returns,
    tau,
    mask,
    weights,
    normalizer,
    t,
    cap,
    logits_dtype,
    num_active,
    chunk_bytes,
    *needs,
):
    need_hidden, need_weight, need_bias = needs
    if hidden.dtype == torch.float16:
        # rule 13: the loss scale is not known yet, so nothing of the gradient is held in float16
        logits_dtype = torch.float32
    tokens, width = hidden.shape[0], logits_dtype or hidden.dtype
    rows = linear.compact(mask, tokens, num_active, hidden.device)
    if normalizer is None:
        active = mask.sum() if mask is not None else torch.full((), tokens, device=hidden.device)
        normalizer = active.clamp(min=1).to(check.wide(hidden))
    normalizer = rows.poison(normalizer)  # NaN in the loss and in every gradient it divides
    kept = rows.take(hidden)
    picked = [rows.take(x) for x in (actions, values, ref_logprobs, returns, weights)]
    dtype = check.wide(hidden)
    loss, stats = hidden.new_zeros((), dtype=dtype), hidden.new_zeros(4, dtype=dtype)
    dvalues = hidden.new_empty(picked[0].shape, dtype=dtype)
    dhidden = torch.empty_like(kept, dtype=width) if need_hidden else None
    dweight = dbias = None
    for part in linear.chunks(kept.shape[0], weight.shape[0], width.itemsize, chunk_bytes):
        use = None if rows.mask is None else rows.mask[part]
        logits = linear.head(kept[part], weight, bias, use, logits_dtype)
        a, v, ref, g, w = (None if x is None else x[part] for x in picked)
        part_loss, part_stats, dvalues[part], _ = operator(backend, "klq_loss_")(
            logits, a, v, ref, g, tau, use, w, normalizer, t, cap
        )
        loss, stats = loss + part_loss, stats + part_stats
        dh, dw, db = linear.chunk_gradients(logits, kept[part], weight, use, *needs)
        if need_hidden:
            dhidden[part] = dh
        dweight = linear.accumulate(dweight, dw) if need_weight else None
        dbias = linear.accumulate(dbias, db) if need_bias else None
    like = hidden, weight, bias
    if hidden.dtype == torch.float16:
        like = tuple(x if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in like)
    grads = linear.finish(rows, like, (dhidden, dweight, dbias), needs)
    return rows.poison(loss), rows.poison(stats), *grads, rows.put(dvalues, tokens)


@composite_fake(OP)
def _(hidden, weight, bias, values, *rest):
    needs = rest[-3:]
    dtype = check.wide(hidden)
    kept = torch.float32 if hidden.dtype == torch.float16 else None
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    grads = [
        hidden.new_empty(shape if need else (0,), dtype=(kept or hidden.dtype) if need else None)
        for shape, need in zip(shapes, needs, strict=True)
    ]
    loss, stats = hidden.new_empty((), dtype=dtype), hidden.new_empty(4, dtype=dtype)
    return loss, stats, *grads, hidden.new_empty(values.shape, dtype=dtype)
