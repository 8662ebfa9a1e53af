# SPDX-License-Identifier: Apache-2.0
"""The KLQ loss on logits: loss and gradient in one pass over each row."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels import _tensor_parallel as tp
from klq_kernels._autograd import first_order, times
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import fake
from klq_kernels._results import KLQLoss, KLQStats
from klq_kernels.klq_loss import reference

OP = "klq_loss"


def klq_loss(
    logits: Tensor,
    actions: Tensor,
    values: Tensor,
    *,
    ref_logprobs: Tensor,
    returns: Tensor,
    tau: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    inplace: bool = False,
    tp_group=None,
    backend: str | None = None,
) -> KLQLoss:
    """One squared loss that trains policy and value together.

    L = sum_t m_t w_t (Q_t - G_t)^2 / normaliser                                        (6)
    Q_t = tau (log pi(a_t|s_t) - log pi_b(a_t|s_t)) + V(s_t)                            (13)

    dL/dlogits = 2 m w (Q - G) tau / normaliser * (onehot(a) - softmax) * dz/dlogits
    dL/dvalues = 2 m w (Q - G) / normaliser

    The residual form is the same call: ref_logprobs=old_logprobs and
    returns=old_values + alpha * advantages give the same number and the same gradient.

    Args:
        logits: [..., V]; layout and dtypes as in `token_logprobs`. Receives gradients.
        actions: [...] integers. values: [...] V(s_t). Receives gradients.
        ref_logprobs: [...] log pi_b(a_t|s_t), made with the same temperature and soft-cap.
        returns: [...] G_t. Both are constants.
        tau: KL coefficient, >= 0.
        mask: [...], nonzero = active. Inactive tokens add nothing and get gradient exactly 0.
        weights: [...] per-token factor of the squared residual; a constant.
        normalizer: number or 0-d tensor; None is the number of active tokens of this call (at
            least 1). Give the total when a batch is split over calls or ranks.
        temperature, logit_softcap, tp_group, backend: as in `token_logprobs`.
        inplace: consume the logits: the gradient is written into their storage, and reading them
            afterwards is undefined. A use of them that autograd saved before this call raises in
            its backward. Leaves that need gradients, expanded and overlapping tensors are refused,
            and so is `tp_group`. The loss serves one backward; a second raises. In a compiled graph
            it changes nothing: there the compiler decides what memory is used again.

    Returns:
        KLQLoss(loss, stats): float32 0-d loss (float64 for float64 logits) and detached sums.

    Raises:
        TypeError, ValueError, IndexError: before any work.

    Source: eq. (6), arXiv 2508.17000 (no factor 1/2).
    """
    use = check.rows(
        OP,
        logits,
        actions,
        mask,
        values=values,
        ref_logprobs=ref_logprobs,
        returns=returns,
        weights=weights,
        normalizer=normalizer,
    )
    check.loss_inputs(OP, logits.shape[:-1], values, ref_logprobs, returns, weights, normalizer)
    tau = check.tau(OP, tau)
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, logits.device, check.wide(logits), backend)
    rest = {
        "ref_logprobs": ref_logprobs,
        "returns": returns,
        "tau": tau,
        "mask": use,
        "weights": weights,
        "normalizer": check.as_tensor(normalizer, logits),
    }
    if inplace:
        if tp_group is not None:
            raise ValueError(f"{OP}: inplace and tp_group exclude each other; drop inplace=True")
        check.consumable(OP, logits)
    if (tp_group := tp.several(OP, tp_group)) is not None:
        shard = tp.shard(tp_group, logits.shape[-1])
        check.action_values(OP, actions, use, shard.vocabulary)
        logprobs = tp.TokenLogprobs.apply(logits, shard.local(actions), use, t, cap, shard, chosen)
        return reference.squared_residuals(logprobs, values, **rest)
    check.action_values(OP, actions, use, logits.shape[-1])
    if chosen == "reference" and not inplace:
        scaling = {"temperature": t, "logit_softcap": logit_softcap}
        return reference.klq_loss(logits, actions, values, **rest, **scaling)
    args = (
        logits,
        actions,
        values,
        ref_logprobs.detach(),
        returns.detach(),
        tau,
        use,
        None if weights is None else weights.detach(),
        rest["normalizer"],
        t,
        cap,
    )
    need = torch.is_grad_enabled() and (logits.requires_grad or values.requires_grad)
    if torch.compiler.is_compiling():
        # also for inplace=True: in a graph, reuse of the logits' memory is the compiler's to find
        loss, stats = TracedLoss.apply(*args, need, chosen)
    elif inplace:
        loss, stats = InplaceLoss.apply(*args, chosen)
    else:
        loss, stats = Loss.apply(*args, need, chosen)
    return KLQLoss(loss, KLQStats(*stats.unbind(0)))


def _rescaled(dlogits: Tensor, unscale: Tensor, upstream: Tensor) -> Tensor:
    """What klq_loss_backward_ leaves in dlogits, as a new tensor."""
    factor = (upstream * unscale).unsqueeze(-1) if unscale.numel() else upstream
    return times(dlogits.to(check.wide(dlogits)), factor).to(dlogits.dtype)


def _dvalues(ctx, dvalues: Tensor, upstream: Tensor) -> Tensor | None:
    return times(dvalues, upstream).to(ctx.values_dtype) if ctx.needs_input_grad[2] else None


_NONES = (None,) * 10  # every argument after values is a constant


class Loss(torch.autograd.Function):
    """Out of place: the gradient made in the forward goes to the first backward; a later one makes
    it again from the saved inputs, so that every backward gives the same bits."""

    @staticmethod
    def forward(ctx, logits, actions, values, *rest):
        *rest, ctx.backend = rest
        loss, stats, *ctx.made = operator(ctx.backend, OP)(logits, actions, values, *rest)
        tensors = [x if isinstance(x, Tensor) else None for x in rest]
        ctx.save_for_backward(logits, actions, values, *tensors)
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in rest]
        ctx.values_dtype = values.dtype
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @first_order(OP)
    def backward(ctx, upstream, *_):
        made, ctx.made = ctx.made, None
        if made is None:
            logits, actions, values, *tensors = ctx.saved_tensors
            rest = [n if x is None else x for x, n in zip(tensors, ctx.numbers, strict=True)]
            made = operator(ctx.backend, OP)(logits, actions, values, *rest)[2:]
        dlogits, dvalues, unscale = made
        if ctx.needs_input_grad[0]:
            operator(ctx.backend, "klq_loss_backward_")(dlogits, unscale, upstream)
        return (
            dlogits if ctx.needs_input_grad[0] else None,
            None,
            _dvalues(ctx, dvalues, upstream),
            *_NONES,
        )


class TracedLoss(torch.autograd.Function):
    """`Loss` for torch.compile, whose backward must not depend on what ran before it."""

    @staticmethod
    def forward(ctx, logits, actions, values, *rest):
        *rest, backend = rest
        made = operator(backend, OP)(logits, actions, values, *rest)
        loss, stats, dlogits, dvalues, unscale = made
        ctx.save_for_backward(dlogits, dvalues, unscale)
        ctx.values_dtype = values.dtype
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, upstream, *_):
        dlogits, dvalues, unscale = ctx.saved_tensors
        dvalues = times(dvalues, upstream).to(ctx.values_dtype)
        return _rescaled(dlogits, unscale, upstream), None, dvalues, *_NONES


class InplaceLoss(torch.autograd.Function):
    """In place: the logits' storage becomes the gradient and is handed to the one backward."""

    @staticmethod
    def forward(ctx, logits, actions, values, *rest):
        *rest, ctx.backend = rest
        plain = ctx.backend == "reference"
        run = _reference_inplace if plain else operator(ctx.backend, "klq_loss_")
        loss, stats, dvalues, unscale = run(logits, actions, values, *rest)
        torch.autograd.graph.increment_version(logits)
        ctx.made = logits.detach(), dvalues, unscale
        ctx.values_dtype = values.dtype
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @first_order(OP)
    def backward(ctx, upstream, *_):
        if ctx.made is None:
            raise RuntimeError(
                f"{OP}: inplace=True hands its gradient over in the first backward and cannot "
                "serve a second; use inplace=False"
            )
        (dlogits, dvalues, unscale), ctx.made = ctx.made, None
        if ctx.backend == "reference":
            dlogits.copy_(_rescaled(dlogits, unscale, upstream))
        else:
            operator(ctx.backend, "klq_loss_backward_")(dlogits, unscale, upstream)
        return dlogits, None, _dvalues(ctx, dvalues, upstream), *_NONES


def _reference_inplace(
    logits, actions, values, ref_logprobs, returns, tau, mask, weights, normalizer, t, cap
):
    """What the op klq_loss_ does, by autograd over the plain PyTorch loss."""
    wide = logits.detach().to(check.wide(logits)).requires_grad_()
    v = values.detach().to(wide.dtype).requires_grad_()
    with torch.enable_grad():
        loss, stats = reference.klq_loss(
            wide,
            actions,
            v,
            ref_logprobs=ref_logprobs,
            returns=returns,
            tau=tau,
            mask=mask,
            weights=weights,
            normalizer=normalizer,
            temperature=t,
            logit_softcap=cap or None,
        )
    dlogits, dvalues = torch.autograd.grad(loss, (wide, v))
    unscale = dlogits.new_empty(0)
    if logits.dtype == torch.float16:  # rule 13: a power of two a row, undone in the backward
        exponent = torch.frexp(dlogits.abs().amax(-1)).exponent.clamp(-100, 100)
        dlogits = torch.ldexp(dlogits, (14 - exponent).unsqueeze(-1))
        unscale = torch.ldexp(torch.ones_like(dvalues), exponent - 14)
    logits.detach().copy_(dlogits)
    return loss.detach(), torch.stack(stats), dvalues, unscale


@fake("klq_loss")
def _(logits, actions, values, ref, returns, tau, mask, weights, normalizer, t, cap, need_grad):
    dtype = check.wide(logits)
    tokens = actions.shape if need_grad else (0,)
    half = logits.dtype == torch.float16 and need_grad
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(4, dtype=dtype),
        logits.new_empty(logits.shape if need_grad else (0,)),
        logits.new_empty(tokens, dtype=dtype),
        logits.new_empty(actions.shape if half else (0,), dtype=torch.float32),
    )


@fake("klq_loss_")
def _(logits, actions, values, ref, returns, tau, mask, weights, normalizer, t, cap):
    dtype = check.wide(logits)
    half = logits.dtype == torch.float16
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(4, dtype=dtype),
        logits.new_empty(actions.shape, dtype=dtype),
        logits.new_empty(actions.shape if half else (0,), dtype=torch.float32),
    )


@fake("klq_loss_backward_")
def _(dlogits, unscale, upstream):
    return None
