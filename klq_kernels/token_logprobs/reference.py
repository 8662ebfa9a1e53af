# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities in plain PyTorch: the oracle (float64 stays) and naive baseline."""

import torch
from torch import Tensor


def scaled(logits: Tensor, temperature: float = 1.0, logit_softcap: float | None = None) -> Tensor:
    """z' = c * tanh(z / c) / T, in float32 (float64 stays).

    A banned token (-inf) stays -inf and gets gradient 0, also when it is the chosen one.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    banned = z == -torch.inf
    z = z.masked_fill(banned, 0.0)
    if logit_softcap:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    return (z / temperature).masked_fill(banned, -torch.inf)


def select_rows(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Inactive rows become 0 by select, so that nothing in them reaches a result or a gradient."""
    return logits if mask is None else torch.where(mask.unsqueeze(-1), logits, 0.0)


def log_softmax(
    logits: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """log pi(.|s) of every row, [..., V]."""
    return torch.log_softmax(scaled(select_rows(logits, mask), temperature, logit_softcap), dim=-1)


def gather(table: Tensor, actions: Tensor, mask: Tensor | None) -> Tensor:
    """table[t, a_t]; NaN where an active id is outside [0, V), exactly 0 where inactive."""
    ids = actions.long()
    if mask is not None:
        ids = ids.masked_fill(~mask, 0)
    valid = (ids >= 0) & (ids < table.shape[-1])
    picked = table.gather(-1, ids.masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    picked = picked.masked_fill(~valid, torch.nan)
    return picked if mask is None else torch.where(mask, picked, 0.0)


def token_logprobs(
    logits: Tensor,
    actions: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """log pi(a_t | s_t) = z'_a - logsumexp(z'), as `klq_kernels.token_logprobs` specifies it."""
    return gather(log_softmax(logits, mask, temperature, logit_softcap), actions, mask)
