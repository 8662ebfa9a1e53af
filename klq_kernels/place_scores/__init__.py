# SPDX-License-Identifier: Apache-2.0
"""Sequence scores onto the last active token of their sequence."""

from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._dispatch import operator, resolve
from klq_kernels._operators import fake
from klq_kernels.place_scores import reference

OP = "place_scores"


def place_scores(
    scores: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Token rewards from sequence scores; no gradient.

    rewards[t] = scores[sequence of t] if t is the last active token of its sequence, else 0

    A sequence without an active token drops its score.

    Args:
        scores: [...], one a sequence, or [S] with `cu_seqlens`; floating point.
        mask: [..., T], or packed [N] with `cu_seqlens`; bool or integers, nonzero = active.
        cu_seqlens: as in `lambda_returns`.
        backend: as in `token_logprobs`.

    Returns:
        [..., T] or [N], float32 (float64 for float64 scores).

    Raises:
        TypeError, ValueError: before any work.
    """
    check.tensor(OP, "mask", mask)
    check.sequences(OP, cu_seqlens, mask.shape)
    use = check.mask(OP, mask, mask.shape, "itself")
    check.per_sequence(OP, "scores", check.tensor(OP, "scores", scores), mask.shape, cu_seqlens)
    check.same_device(OP, mask.device, scores=scores, cu_seqlens=cu_seqlens)
    chosen = resolve(OP, mask.device, check.wide(scores), backend)
    if chosen == "reference":
        return reference.place_scores(scores, use, cu_seqlens=cu_seqlens)
    return operator(chosen, OP)(scores, use, cu_seqlens)


@fake("place_scores", differentiable=False)
def _(scores, mask, cu_seqlens):
    return scores.new_empty(mask.shape, dtype=check.wide(scores))
