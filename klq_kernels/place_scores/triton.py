# SPDX-License-Identifier: Apache-2.0
"""Sequence scores onto last active tokens in Triton: one program a sequence looks for the token and
writes one number into zeros."""

import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton_host as host


@triton.jit
def span(ends, s, there, length, tokens):
    """[begin, end) of sequences; clamped, so that ends nobody checked cannot leave the buffers."""
    if ends is None:
        begin = s * length
        end = begin + tl.where(there, length, 0)
    else:
        begin = tl.load(ends + s, mask=there, other=0).to(tl.int64)
        end = tl.load(ends + s + 1, mask=there, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), tokens)
        end = tl.minimum(tl.maximum(end, begin), tokens)
    return begin, end


@triton.jit(do_not_specialize=["sequences", "length", "tokens"])
def place_scores_kernel(scores, mask, ends, out, sequences, length, tokens, TILE: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    begin, end = span(ends, s, s < sequences, length, tokens)
    last = tl.full([], -1, tl.int64)
    while (end > begin) & (last < 0):  # from the right, until a tile has an active token
        at = end - 1 - tl.arange(0, TILE)
        active = tl.load(mask + at, mask=at >= begin, other=0) != 0
        last = tl.max(tl.where(active & (at >= begin), at, -1), 0)
        end -= TILE
    if last >= 0:
        tl.store(out + last, tl.load(scores + s).to(tl.float32))


def place_scores(scores: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    out = host.like(mask, mask.shape).zero_()
    tokens, length = mask.numel(), 0 if cu_seqlens is not None else mask.shape[-1]
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
    else:
        sequences = tokens // length if length else 0
    tile = min(1024, max(16, host.power_of_2(length or tokens)))
    host.launch(
        place_scores_kernel,
        sequences if tokens else 0,
        mask,
        *(host.compact(scores), host.compact(mask), host.compact(cu_seqlens), out),
        *(sequences, length, tokens, tile),
        num_warps=max(1, tile // 256),
    )
    return out
