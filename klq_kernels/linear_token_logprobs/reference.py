# SPDX-License-Identifier: Apache-2.0
"""LM head, then token log-probs, in plain PyTorch: logits of every row are materialised."""

import torch
from torch import Tensor

from klq_kernels import _tensor_parallel as tp
from klq_kernels._linear_cut import AMX_TILE
from klq_kernels.token_logprobs.reference import select_rows, token_logprobs


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """hidden @ weight.T + bias; inactive hidden rows are 0 before they meet the weight."""
    hidden = select_rows(hidden, mask)
    if logits_dtype is not None:
        hidden, weight = hidden.to(logits_dtype), weight.to(logits_dtype)
    # the casts of autocast are made before this; logits asked for in float32 stay in it
    with torch.autocast(hidden.device.type, enabled=False):
        rows, columns = whole_tiles(hidden, weight)
        logits = (rows @ columns.T)[..., : len(weight)]
    return logits if bias is None else logits + bias.to(logits.dtype)


def whole_tiles(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros up to whole tiles of D and V, where PyTorch's product, or its backward, would
    carry NaN of a row into the row before (`_linear_cut.spaced`)."""
    vocabulary, width = weight.shape
    more = -width % AMX_TILE, -vocabulary % AMX_TILE
    if hidden.is_cuda or hidden.dtype != torch.bfloat16 or more == (0, 0):
        return hidden, weight
    pad = torch.nn.functional.pad
    return pad(hidden, (0, more[0])), pad(weight, (0, more[0], 0, more[1]))


def too_few(mask: Tensor | None, tokens: int, num_active: int | None) -> Tensor | bool:
    """Whether `num_active` is smaller than the number of active tokens (a 0-d tensor or False)."""
    if num_active is None:
        return False
    return num_active < tokens if mask is None else mask.sum() > num_active


def poisoned(x: Tensor | None, few: Tensor | bool) -> Tensor | None:
    """NaN, and NaN gradients, where `num_active` was too small: never a partial result."""
    if few is False or x is None:
        return x
    few = torch.as_tensor(few, device=x.device)
    return x * torch.where(few, torch.nan, 1.0).to(x.dtype)


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
    shard: tp.Shard | None = None,
) -> Tensor:
    """token_logprobs(hidden @ weight.T + bias, actions); weight and bias may be a rank's slice."""
    few = too_few(mask, actions.numel(), num_active)
    hidden, weight, bias = (poisoned(x, few) for x in (hidden, weight, bias))
    if shard is not None:
        hidden = tp.SumGradient.apply(hidden, shard.group)
    logits = head_logits(hidden, weight, bias, mask, logits_dtype)
    if shard is None:
        scaling = {"temperature": temperature, "logit_softcap": logit_softcap}
        logprobs = token_logprobs(logits, actions, mask=mask, **scaling)
    else:
        rest = mask, temperature, logit_softcap or 0.0, shard, "reference"
        logprobs = tp.TokenLogprobs.apply(logits, shard.local(actions), *rest)
    return poisoned(logprobs, few)
