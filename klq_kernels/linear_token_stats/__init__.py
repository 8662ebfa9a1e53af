# SPDX-License-Identifier: Apache-2.0
"""Hidden states to log-prob and entropy through the LM head, nothing kept."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels import _linear as linear
from klq_kernels import _tensor_parallel as tp
from klq_kernels._dispatch import operator, resolve
from klq_kernels._linear_head import Head, sharded_logits
from klq_kernels._operators import composite, composite_fake
from klq_kernels._results import TokenStats
from klq_kernels.linear_token_stats import reference

OP = "linear_token_stats"


@torch.no_grad()
def linear_token_stats(
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
    tp_group=None,
    backend: str | None = None,
) -> TokenStats:
    """token_stats(hidden @ weight.T + bias, actions): for rollouts and references; no gradient.

    Args: as in `linear_token_logprobs`.

    Returns:
        TokenStats(logprobs, entropy, None, None), each [...] float32 (float64 for float64 inputs),
        nats, exactly 0 at inactive tokens.

    Raises:
        TypeError, ValueError, IndexError: before any work.
    """
    weight, tp_group = tp.unwrap(OP, weight, tp_group)
    hidden, weight, bias = linear.autocast(OP, hidden, weight, bias)
    use = linear.inputs(
        OP, hidden, weight, bias, actions, mask, num_active, chunk_bytes, logits_dtype
    )
    t, cap = check.scaling(OP, temperature, logit_softcap)
    chosen = resolve(OP, hidden.device, check.wide(hidden), backend)
    shard = tp.shard_of(OP, tp_group, weight.shape[0])
    check.action_values(OP, actions, use, weight.shape[0] if shard is None else shard.vocabulary)
    if chosen == "reference":
        return reference.linear_token_stats(
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
    args = (
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
    )
    if shard is None:
        logprobs, entropy = operator(chosen, OP)(*args)
    else:
        logprobs, entropy = forward(chosen, *args, shard=shard)
    return TokenStats(logprobs.reshape(actions.shape), entropy.reshape(actions.shape), None, None)


@composite(
    OP,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor actions, Tensor? mask, float temperature, "
    "float softcap, ScalarType? logits_dtype, SymInt? num_active, int? chunk_bytes) "
    "-> (Tensor, Tensor)",
)
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
    *,
    shard=None,
):
    tokens = hidden.shape[0]
    rows = linear.compact(backend, mask, tokens, num_active, hidden.device)
    logits_dtype = sharded_logits(backend, hidden, weight, logits_dtype, shard)
    usable = backend if shard is None else None
    head = Head(hidden, weight, bias, rows, logits_dtype, chunk_bytes, backend=usable)
    head.whole = shard is not None and shard.vocabulary is None
    actions = tp.local(shard, rows.take(actions))
    logprobs = hidden.new_empty(head.count, dtype=check.wide(hidden))
    entropy = torch.empty_like(logprobs)
    for part in head.parts_to_sum() if head.ours else ():
        logprobs[part], _, entropy[part] = head.sums(part, actions[part], t, cap, entropy=True)
    for part in head.parts() if not head.ours else ():
        logits, use = head.logits(part), head.mask(part)
        if shard is None:
            made = operator(backend, "token_stats")(logits, actions[part], None, use, t, cap)[:2]
        else:
            made = tp.stats(logits, actions[part], use, t, cap, shard.group, backend)
        logprobs[part], entropy[part] = made
    return tuple(rows.poison(rows.put(x, tokens)) for x in (logprobs, entropy))


@composite_fake(OP)
def _(backend, hidden, weight, bias, actions, *rest):
    return tuple(hidden.new_empty(actions.shape, dtype=check.wide(hidden)) for _ in range(2))
