# SPDX-License-Identifier: Apache-2.0
"""Hidden states to token log-probs through the LM head, logits never kept."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels import _linear as linear
from klq_kernels import _tensor_parallel as tp
from klq_kernels._autograd import first_order
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import composite, composite_fake
from klq_kernels.linear_token_logprobs import reference

OP = "linear_token_logprobs"


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    num_active: int | None = None,
    chunk_bytes: int | None = None,
    keep_bytes: int = 0,
    tp_group=None,
    backend: str | None = None,
) -> Tensor:
    """token_logprobs(hidden @ weight.T + bias, actions) for any upstream gradient.

    The backward makes the logits of each chunk again (8 N D V operations in all).

    Args:
        hidden: [..., D]; weight: [V, D]; bias: [V] or None; one dtype, unless under autocast,
            which casts them as F.linear does. All three receive gradients.
        actions, mask, temperature, logit_softcap, backend: as in `token_logprobs`. NaN in an
            inactive row of `hidden` reaches no result and no gradient.
        logits_dtype: torch.float32 keeps the head's logits in float32; None: in hidden's dtype.
        num_active: number of active tokens, when the caller knows it: only these meet the head,
            without a synchronisation. More is allowed; fewer makes every result NaN.
        chunk_bytes: bound on the logits held at a time (default 512 MiB).
        keep_bytes: upper bound on what may be kept to spare the backward the logits; nothing is
            kept in this version.
        tp_group: as in `token_logprobs`, for a weight [V / ranks, D]; the gradient of hidden is
            complete (already summed over the group). A DTensor weight sharded on dim 0 brings its
            own group.

    Returns:
        [...], float32 (float64 for float64 inputs), exactly 0 at inactive tokens.

    Raises:
        TypeError, ValueError, IndexError: before any work.
    """
    weight, tp_group = tp.unwrap(OP, weight, tp_group)
    hidden, weight, bias = linear.autocast(OP, hidden, weight, bias)
    use = linear.inputs(
        OP, hidden, weight, bias, actions, mask, num_active, chunk_bytes, logits_dtype
    )
    linear.integer(OP, "keep_bytes", keep_bytes, 0)
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, hidden.device, check.wide(hidden), backend)
    if (tp_group := tp.several(OP, tp_group)) is not None:
        return sharded(
            *(OP, hidden, weight, bias, actions, use, t, cap),
            *(logits_dtype, num_active, tp_group, chosen),
        )
    check.action_values(OP, actions, use, weight.shape[0])
    if chosen == "reference":
        return reference.linear_token_logprobs(
            hidden,
            weight,
            actions,
            bias=bias,
            mask=use,
            temperature=t,
            logit_softcap=logit_softcap,
            logits_dtype=logits_dtype,
            num_active=num_active,
        )
    logprobs = LinearTokenLogprobs.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        actions.reshape(-1),
        None if use is None else use.reshape(-1),
        t,
        cap,
        logits_dtype,
        num_active,
        chunk_bytes,
        chosen,
    )
    return logprobs.reshape(actions.shape)


def sharded(
    op, hidden, weight, bias, actions, use, t, cap, logits_dtype, num_active, tp_group, backend
) -> Tensor:
    """Log-probs from a vocabulary slice of the head, composed of differentiable pieces."""
    shard = tp.shard(tp_group, weight.shape[0])
    check.action_values(op, actions, use, shard.vocabulary)
    logits = reference.head_logits(
        tp.SumGradient.apply(hidden, shard.group), weight, bias, use, logits_dtype
    )
    logprobs = tp.TokenLogprobs.apply(logits, shard.local(actions), use, t, cap, shard, backend)
    few = reference.too_few(use, actions.numel(), num_active)
    return reference.poisoned(logprobs, few)


class LinearTokenLogprobs(torch.autograd.Function):
    """Saves hidden, weight and three numbers a token; the backward recomputes logits by chunks."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, actions, mask, *rest):
        *rest, ctx.backend = rest
        logprobs, row_stats = operator(ctx.backend, OP)(hidden, weight, bias, actions, mask, *rest)
        ctx.save_for_backward(hidden, weight, bias, actions, mask, row_stats)
        ctx.rest = rest
        return logprobs

    @staticmethod
    @first_order(OP)
    def backward(ctx, grad):
        hidden, weight, bias, actions, mask, row_stats = ctx.saved_tensors
        need = ctx.needs_input_grad
        grads = operator(ctx.backend, f"{OP}_backward")(
            grad, hidden, weight, bias, actions, mask, row_stats, *ctx.rest, *need[:3]
        )
        grads = [g if n else None for g, n in zip(grads, need[:3], strict=True)]
        return *grads, *(None,) * 8


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor actions, Tensor? mask"
_REST = (
    "float temperature, float softcap, ScalarType? logits_dtype, SymInt? num_active, "
    "int? chunk_bytes"
)


@composite(OP, f"({_HEAD}, {_REST}) -> (Tensor, Tensor)")
@linear.keeps_dtypes
def _forward(
    backend, hidden, weight, bias, actions, mask, t, cap, logits_dtype, num_active, chunk_bytes
):
    tokens, width = hidden.shape[0], logits_dtype or hidden.dtype
    rows = linear.compact(mask, tokens, num_active, hidden.device)
    hidden, actions = rows.take(hidden), rows.take(actions)
    dtype = check.wide(hidden)
    logprobs = hidden.new_empty(actions.shape, dtype=dtype)
    row_stats = hidden.new_empty((3, *actions.shape), dtype=dtype)
    for part in linear.chunks(actions.shape[0], weight.shape[0], width.itemsize, chunk_bytes):
        use = None if rows.mask is None else rows.mask[part]
        logits = linear.head(hidden[part], weight, bias, use, logits_dtype)
        logprobs[part], row_stats[:, part] = operator(backend, "token_logprobs")(
            logits, actions[part], use, t, cap
        )
    return rows.poison(rows.put(logprobs, tokens)), row_stats


@composite(
    f"{OP}_backward",
    f"(Tensor grad, {_HEAD}, Tensor row_stats, {_REST}, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
)
@linear.keeps_dtypes
def _backward(
    backend,
    grad,
    hidden,
    weight,
    bias,
    actions,
    mask,
    row_stats,
    t,
    cap,
    logits_dtype,
    num_active,
    chunk_bytes,
    need_hidden,
    need_weight,
    need_bias,
):
    tokens, width = hidden.shape[0], logits_dtype or hidden.dtype
    rows = linear.compact(mask, tokens, num_active, hidden.device)
    kept, actions = rows.take(hidden), rows.take(actions)
    grad = rows.poison(rows.take(grad))
    dhidden = torch.empty_like(kept) if need_hidden else None
    dweight = dbias = None
    for part in linear.chunks(actions.shape[0], weight.shape[0], width.itemsize, chunk_bytes):
        use = None if rows.mask is None else rows.mask[part]
        logits = linear.head(kept[part], weight, bias, use, logits_dtype)
        dlogits = operator(backend, "token_logprobs_backward")(
            grad[part], logits, actions[part], use, row_stats[:, part], t, cap
        )
        dh, dw, db = linear.chunk_gradients(
            dlogits, kept[part], weight, use, need_hidden, need_weight, need_bias
        )
        if need_hidden:
            dhidden[part] = dh
        dweight = linear.accumulate(dweight, dw) if need_weight else None
        dbias = linear.accumulate(dbias, db) if need_bias else None
    needs = need_hidden, need_weight, need_bias
    return linear.finish(rows, (hidden, weight, bias), (dhidden, dweight, dbias), needs)


@composite_fake(OP)
def _(hidden, weight, bias, actions, mask, t, cap, logits_dtype, num_active, chunk_bytes):
    rows = actions.shape[0] if num_active is None or mask is None else num_active
    dtype = check.wide(hidden)
    return hidden.new_empty(actions.shape, dtype=dtype), hidden.new_empty((3, rows), dtype=dtype)


@composite_fake(f"{OP}_backward")
def _(grad, hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )
