# SPDX-License-Identifier: Apache-2.0
"""Sequence scores onto last active tokens, in plain PyTorch."""

import torch
from torch import Tensor

from klq_kernels.lambda_returns.reference import sequence_ids


@torch.no_grad()
def place_scores(scores: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """rewards[t] = score of the sequence at its last active t, else 0; see the public function."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    order = torch.arange(1, mask.shape[-1] + 1, device=mask.device).expand(mask.shape)
    rank = torch.where(mask, order, 0)  # 1-based position of active tokens
    if cu_seqlens is None:
        last = rank.amax(-1, keepdim=True) if mask.shape[-1] else rank
        score = scores.to(dtype).unsqueeze(-1)
    else:
        count = cu_seqlens.shape[0] - 1
        ids = sequence_ids(cu_seqlens, mask.shape[0])
        rank = torch.where(ids < count, rank, 0)
        last = torch.zeros(count + 1, dtype=rank.dtype, device=mask.device)
        last = last.scatter_reduce(0, ids, rank, "amax")[ids]
        score = torch.cat([scores.to(dtype), scores.new_zeros(1, dtype=dtype)])[ids]
    return torch.where((rank > 0) & (rank == last), score, 0.0)
