# SPDX-License-Identifier: Apache-2.0
"""Hidden states to the KLQ loss through the LM head: gradients leave the forward."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels import _linear as linear
from klq_kernels import _tensor_parallel as tp
from klq_kernels._autograd import first_order, times
from klq_kernels._dispatch import operator, resolve
from klq_kernels._linear_head import Head, sharded_logits
from klq_kernels._operators import composite, composite_fake
from klq_kernels._results import KLQLoss, KLQStats
from klq_kernels.klq_loss.reference import squared_residuals
from klq_kernels.linear_klq_loss import reference

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
    values are made chunk by chunk in the forward (6 N D V operations, no recomputation; 4 N D V and
    no dW with a frozen weight). dW is summed in float32. Beyond results the call takes one chunk of
    logits, that float32 dW where the weight has 16 bits, and little else (float16 heads: products
    in float32, which are slower). The loss serves one backward, which passes over the gradients
    only if its upstream is not 1; a second raises.

    Args:
        hidden: [..., D]; weight: [V, D]; bias: [V] or None, as in `linear_token_logprobs`. They and
            `values` receive gradients.
        actions, values, ref_logprobs, returns, tau, mask, weights, normalizer, temperature,
            logit_softcap: as in `klq_loss`.
        logits_dtype, num_active, chunk_bytes, tp_group: as in `linear_token_logprobs`; too small a
            num_active makes the loss, its sums and every entry of every gradient NaN.
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
    shard = tp.shard_of(OP, tp_group, weight.shape[0])
    check.action_values(OP, actions, use, weight.shape[0] if shard is None else shard.vocabulary)
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
            shard=shard,
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
        shard,
        chosen,
    )
    return KLQLoss(loss, KLQStats(*stats.unbind(0)))


class LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, values, *rest):
        *rest, shard, ctx.backend = rest
        args = hidden, weight, bias, values, *rest
        if shard is None:
            loss, stats, *made = operator(ctx.backend, OP)(*args)
        else:
            loss, stats, *made = forward(ctx.backend, *args, shard=shard)
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
            made = [times(g, upstream) for g in ctx.saved_tensors]
        elif ctx.made is None:
            raise RuntimeError(
                f"{OP}: the gradients made in the forward were handed to the first backward; a "
                "second one needs a new call"
            )
        else:
            made, ctx.made = ctx.made, None
            scale = operator(ctx.backend, "klq_loss_backward_")
            for g in made:  # where they lie; the kernel does nothing for an upstream of 1
                if g.numel():
                    scale(g if g.dim() == 2 else g.unsqueeze(0), g.new_empty(0), upstream)
        grads = [
            g.to(dtype) if need else None
            for g, dtype, need in zip(made, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return *grads, *(None,) * 17


@composite(
    OP,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor values, Tensor actions, "
    "Tensor ref_logprobs, Tensor returns, float tau, Tensor? mask, Tensor? weights, "
    "Tensor? normalizer, float temperature, float softcap, ScalarType? logits_dtype, "
    "SymInt? num_active, int? chunk_bytes, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@linear.keeps_dtypes
def forward(
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
    shard=None,
):
    half = hidden.dtype == torch.float16
    if half:
        # rule 13: the loss scale is not known yet, so nothing of the gradient is held in float16
        logits_dtype = torch.float32
    tokens, dtype = hidden.shape[0], check.wide(hidden)
    rows = linear.compact(backend, mask, tokens, num_active, hidden.device)
    logits_dtype = sharded_logits(backend, hidden, weight, logits_dtype, shard)
    usable = backend if shard is None else None
    head = Head(hidden, weight, bias, rows, logits_dtype, chunk_bytes, needs, usable)
    head.whole = shard is not None and shard.vocabulary is None
    ids, picked = tp.local(shard, rows.take(actions)), None
    made = []  # loss, sums, gradient of values of each chunk
    for part in head.parts():
        a, use = ids[part], head.mask(part)
        if head.ours:
            e = head.room(part)
            logprobs, (factors, own, _), _ = head.sums(part, a, t, cap, out=e)
        if picked is None:  # while a device is at the first product
            picked = [rows.take(x) for x in (values, ref_logprobs, returns, weights)]
            if normalizer is None:
                count = hidden.new_full((), tokens, dtype=dtype) if mask is None else mask.sum()
                normalizer = count.clamp(min=1).to(dtype)
            normalizer = rows.poison(normalizer)  # NaN in the loss and all gradients it divides
        v, ref, g, w = (None if x is None else x[part] for x in picked)
        if head.ours:
            *results, coefficients, dvalues = operator(backend, "klq_loss_tokens")(
                logprobs, v, ref, g, tau, use, w, normalizer
            )
            made.append((*results, dvalues))
            head.backward_scaled(part, e, coefficients * factors, own, a)
        else:
            logits = head.logits(part)
            if shard is None:
                *results, _ = operator(backend, "klq_loss_")(
                    logits, a, v, ref, g, tau, use, w, normalizer, t, cap
                )
            else:
                rest = {"ref_logprobs": ref, "returns": g, "tau": tau, "mask": use, "weights": w}
                results = _sharded(
                    backend, logits, a, v, t, cap, shard, normalizer=normalizer, **rest
                )
            head.backward(part, logits)
            made.append(results)
    if not made:  # no token
        made = [[hidden.new_zeros(n, dtype=dtype) for n in ((), (4,), (0,))]]
    losses, stats, dvalues = zip(*made, strict=True)
    loss, stats = sum(losses[1:], losses[0]), sum(stats[1:], stats[0])
    dvalues = torch.cat(dvalues) if len(made) > 1 else dvalues[0]
    grads = tp.complete(head.gradients(keep_wide=half), shard)
    return rows.poison(loss), rows.poison(stats), *grads, rows.put(dvalues, tokens)


def _sharded(backend, logits, ids, values, t, cap, shard, **rest):
    """klq_loss_ on this rank's slice of the vocabulary: (loss, stats, dvalues)."""
    _, row_stats = operator(backend, "token_logprobs")(logits, ids, rest["mask"], t, cap)
    logprobs, row_stats = tp.merge(row_stats, ids, rest["mask"], shard.group)
    x, v = (y.detach().to(logprobs.dtype).requires_grad_() for y in (logprobs, values))
    with torch.enable_grad():
        loss, stats = squared_residuals(x, v, **rest)
        coefficients, dvalues = torch.autograd.grad(loss, (x, v))
    backward = operator(backend, "token_logprobs_backward_")
    backward(logits, coefficients, ids, rest["mask"], row_stats, t, cap)
    return loss.detach(), torch.stack(stats), dvalues


@composite_fake(OP)
def _(backend, hidden, weight, bias, values, *rest):
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
