# SPDX-License-Identifier: Apache-2.0
"""Hidden states to token log-probs through the LM head, logits never kept."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels import _linear as linear
from klq_kernels import _tensor_parallel as tp
from klq_kernels._autograd import first_order
from klq_kernels._dispatch import operator, resolve
from klq_kernels._linear_cut import pitch
from klq_kernels._linear_head import Head, ours, sharded_logits
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

    The backward makes the logits of each chunk again (8 N D V operations in all), except those that
    `keep_bytes` let the forward keep (6 N D V where it keeps them all). dW is summed in float32.

    Args:
        hidden: [..., D]; weight: [V, D]; bias: [V] or None; one dtype, unless under autocast,
            which casts them as F.linear does. All three receive gradients.
        actions, mask, temperature, logit_softcap, backend: as in `token_logprobs`. NaN in an
            inactive row of `hidden` reaches no result and no gradient.
        logits_dtype: torch.float32 keeps the head's logits in float32; None: in hidden's dtype.
            On Hopper those of bfloat16 heads whose weight has rows of whole 16 bytes are never
            rounded, either way (unless backend="triton").
        num_active: number of active tokens, when the caller knows it: only these meet the head,
            without a synchronisation. More is allowed; fewer makes every result and every entry of
            every gradient NaN, never a part of them.
        chunk_bytes: bound on the logits held at a time (default 512 MiB). Beyond results and what
            `keep_bytes` allows, forward and backward take such a chunk, a float32 dW where the
            weight has 16 bits, and little else.
        keep_bytes: bound on the logits kept for the backward, of the first tokens, when a gradient
            is wanted: 2 bytes a logit where those are never rounded, elsewhere the size of their
            dtype. It changes time and memory; how gradients are rounded, where logits are not; and
            where chunks are cut, which may show in the last bits.
        tp_group: as in `token_logprobs`, for a weight [V / ranks, D]; the gradient of hidden is
            complete (already summed over the group). With (group, start) the tokens are one chunk:
            ranks that do not know each other's widths could not cut alike. A DTensor weight sharded
            on dim 0 brings its own group and start.

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
    shard = tp.shard_of(OP, tp_group, weight.shape[0])
    check.action_values(OP, actions, use, weight.shape[0] if shard is None else shard.vocabulary)
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
            shard=shard,
        )
    wanted = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
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
        keep_bytes if wanted and torch.is_grad_enabled() else 0,
        shard,
        chosen,
    )
    return logprobs.reshape(actions.shape)


class LinearTokenLogprobs(torch.autograd.Function):
    """Saves hidden, weight, three numbers a token and the logits it may keep."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, actions, mask, *rest):
        *rest, keep_bytes, shard, backend = rest
        args = hidden, weight, bias, actions, mask, *rest, keep_bytes
        if shard is None:
            logprobs, row_stats, kept = operator(backend, OP)(*args)
        else:
            logprobs, row_stats, kept = forward(backend, *args, shard=shard)
        ctx.save_for_backward(hidden, weight, bias, actions, mask, row_stats, kept)
        ctx.rest, ctx.shard, ctx.backend = rest, shard, backend
        return logprobs

    @staticmethod
    @first_order(OP)
    def backward(ctx, grad):
        need = ctx.needs_input_grad
        args = grad, *ctx.saved_tensors, *ctx.rest, *need[:3]
        if ctx.shard is None:
            grads = operator(ctx.backend, f"{OP}_backward")(*args)
        else:
            grads = backward(ctx.backend, *args, shard=ctx.shard)
        grads = [g if n else None for g, n in zip(grads, need[:3], strict=True)]
        return *grads, *(None,) * 10


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor actions, Tensor? mask"
_REST = (
    "float temperature, float softcap, ScalarType? logits_dtype, SymInt? num_active, "
    "int? chunk_bytes"
)


@composite(OP, f"({_HEAD}, {_REST}, int keep_bytes) -> (Tensor, Tensor, Tensor)")
@linear.keeps_dtypes
def forward(
    backend,
    hidden,
    weight,
    bias,
    actions,
    mask,
    t,
    cap,
    logits_dtype,
    num_active,
    chunk_bytes,
    keep_bytes,
    *,
    shard=None,
):
    """Log-probs, (max, rest, z_a) of the rows that met the head, and what is kept of the first:
    their logits; or `Head.sums`' row_stats, and the exponentials of the first."""
    tokens, dtype = hidden.shape[0], check.wide(hidden)
    rows = linear.compact(backend, mask, tokens, num_active, hidden.device)
    logits_dtype = sharded_logits(backend, hidden, weight, logits_dtype, shard)
    usable = backend if shard is None else None
    head = Head(hidden, weight, bias, rows, logits_dtype, chunk_bytes, backend=usable)
    head.whole = shard is not None and shard.vocabulary is None
    actions = tp.local(shard, rows.take(actions))
    logprobs = hidden.new_empty(head.count, dtype=dtype)
    row_stats = hidden.new_zeros((3, head.count), dtype=dtype)
    keep, width = _kept(head.count, weight, head.dtype, 0 if head.whole else keep_bytes)
    kept = hidden.new_empty((keep, width), dtype=head.dtype)
    kept[:, weight.shape[0] :].zero_()
    visible = kept[:, : weight.shape[0]]
    token_logprobs = operator(backend, "token_logprobs")

    def run(part: slice, out: Tensor | None) -> None:
        logits, use = head.logits(part, out), head.mask(part)
        made = token_logprobs(logits, actions[part], use, t, cap)
        if shard is not None:
            made = tp.merge(made[1], actions[part], use, shard.group)
        logprobs[part], row_stats[:, part] = made

    if head.ours:
        for part in head.parts_to_sum(0, keep):
            made = head.sums(part, actions[part], t, cap, out=visible[part])
            logprobs[part], row_stats[:, part] = made[:2]
        for part in head.parts_to_sum(keep):
            logprobs[part], row_stats[:, part] = head.sums(part, actions[part], t, cap)[:2]
    else:
        for part in head.parts(0, keep):
            run(part, visible[part])
        for part in head.parts(keep):
            run(part, None)
    return rows.poison(rows.put(logprobs, tokens)), row_stats, kept


def _kept(count: int, weight: Tensor, dtype: torch.dtype, keep_bytes: int) -> tuple[int, int]:
    """Rows that are kept, and elements from one to the next."""
    width = pitch(weight.shape[0], weight.is_cuda)
    return min(count, keep_bytes // (width * dtype.itemsize)), width


@composite(
    f"{OP}_backward",
    f"(Tensor grad, {_HEAD}, Tensor row_stats, Tensor kept, {_REST}, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
)
@linear.keeps_dtypes
def backward(
    backend,
    grad,
    hidden,
    weight,
    bias,
    actions,
    mask,
    row_stats,
    kept,
    t,
    cap,
    logits_dtype,
    num_active,
    chunk_bytes,
    *needs,
    shard=None,
):
    rows = linear.compact(backend, mask, hidden.shape[0], num_active, hidden.device)
    logits_dtype = sharded_logits(backend, hidden, weight, logits_dtype, shard)
    usable = backend if shard is None else None
    head = Head(hidden, weight, bias, rows, logits_dtype, chunk_bytes, needs, usable)
    head.whole = shard is not None and shard.vocabulary is None
    actions = tp.local(shard, rows.take(actions))
    grad = rows.poison(rows.take(grad))
    keep, vocabulary = len(kept), weight.shape[0]
    if head.ours:
        grad = grad if rows.mask is None else torch.where(rows.mask, grad, 0.0)
        if keep:
            scale, own = grad[:keep] * row_stats[0, :keep], row_stats[1]
            for part in head.parts_to_scale(keep):
                e = kept[part, :vocabulary]
                head.backward_scaled(part, e, scale[part], own[part], actions[part], keep)
        for part in head.parts(keep):
            rest = actions[part], grad[part], row_stats[:, part], t, cap
            head.backward(part, head.dlogits(part, *rest))
        return head.gradients()
    token_logprobs_backward = operator(backend, "token_logprobs_backward")
    token_logprobs_backward_ = operator(backend, "token_logprobs_backward_")
    for part in head.parts(0, keep):
        rest = actions[part], head.mask(part), row_stats[:, part], t, cap
        logits = kept[part, :vocabulary]
        dlogits = token_logprobs_backward(grad[part], logits, *rest)
        head.backward(part, dlogits)
        del dlogits  # before the next is made
    for part in head.parts(keep):
        rest = actions[part], head.mask(part), row_stats[:, part], t, cap
        logits = head.logits(part)
        token_logprobs_backward_(logits, grad[part], *rest)
        head.backward(part, logits)
    return tp.complete(head.gradients(), shard)


@composite_fake(OP)
def _(backend, hidden, weight, bias, actions, mask, *rest):
    _, _, logits_dtype, num_active, _, keep = rest
    tokens = actions.shape[0]
    rows = tokens if num_active is None or mask is None else torch.sym_min(num_active, tokens)
    own = ours(backend, hidden, weight)
    dtype, kept = check.wide(hidden), hidden.dtype if own else logits_dtype or hidden.dtype
    keep, width = _kept(rows, weight, kept, keep)
    return (
        hidden.new_empty(actions.shape, dtype=dtype),
        hidden.new_empty((3, rows), dtype=dtype),
        hidden.new_empty((keep, width), dtype=kept),
    )


@composite_fake(f"{OP}_backward")
def _(backend, grad, hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )
