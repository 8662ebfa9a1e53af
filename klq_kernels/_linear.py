# SPDX-License-Identifier: Apache-2.0
"""What the three LM-head ops share: argument checks, and compaction of inactive tokens."""

from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from klq_kernels import _checks as check

AUTOCAST = ("cpu", "cuda")


def keeps_dtypes(function):
    """Runs `function` outside autocast: `autocast` below has made its casts, and logits or sums
    asked for in float32 must not be cast back."""

    @wraps(function)
    def run(backend, x, *args, **kwargs):
        device = x.device.type
        with torch.autocast(device if device in AUTOCAST else "cpu", enabled=False):
            return function(backend, x, *args, **kwargs)

    return run


def autocast(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """Casts as F.linear does under autocast; otherwise the three dtypes must agree."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name != "bias" or x is not None:
            check.floating(op, name, x)
    device = hidden.device.type
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = (
            x if x is None or x.dtype == torch.float64 else x.to(dtype)
            for x in (hidden, weight, bias)
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{op}: {name} is {x.dtype} but hidden is {hidden.dtype}; cast one of them or run "
                "under torch.autocast"
            )
    return hidden, weight, bias


def integer(op: str, name: str, n, low: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < low:
        raise ValueError(f"{op}: {name} must be an integer >= {low}, got {n!r}")


def inputs(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    num_active: int | None,
    chunk_bytes: int | None,
    logits_dtype: torch.dtype | None,
    **others: Tensor | None,
) -> Tensor | None:
    """Checks shared by the linear ops; returns `mask` as bool."""
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: hidden must be [..., D] and weight [V, D], got {check.shape_of(hidden)} and "
            f"{check.shape_of(weight)}"
        )
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(
            f"{op}: weight must be [V, D] with V >= 1 and D >= 1, got {check.shape_of(weight)}"
        )
    if bias is not None:
        check.has_shape(op, "bias", bias, weight.shape[:1], "weight without D")
    check.actions(op, actions, hidden.shape[:-1], "hidden without D")
    use = check.mask(op, mask, actions.shape, "actions")
    for name, n, low in (("num_active", num_active, 0), ("chunk_bytes", chunk_bytes, 1)):
        if n is not None:
            integer(op, name, n, low)
    if logits_dtype not in (None, torch.float32, hidden.dtype):
        raise TypeError(
            f"{op}: logits_dtype must be None, torch.float32 or hidden's {hidden.dtype}, "
            f"got {logits_dtype}"
        )
    check.same_device(
        op, hidden.device, weight=weight, bias=bias, actions=actions, mask=mask, **others
    )
    return use


class Rows(NamedTuple):
    """The tokens that meet the head: all of them, or `num_active` compacted ones."""

    index: Tensor | None  # [n] positions, N where a slot is spare; None = all, in order
    source: Tensor | None  # [n] the same, but a row there is
    mask: Tensor | None  # [n] active slots
    bad: (
        Tensor | None
    )  # 0-d: NaN if `num_active` was smaller than the number of active tokens, or 0

    def take(self, x: Tensor | None) -> Tensor | None:
        """The rows of `x` [N, ...] that meet the head; spare slots repeat the last row."""
        return x if x is None or self.source is None else x.index_select(0, self.source)

    def put(self, x: Tensor, tokens: int) -> Tensor:
        """The inverse of `take`: [N, ...], 0 where no row was taken (NaN if too few were)."""
        if self.index is None:
            return x
        out = x.new_empty((tokens + 1, *x.shape[1:])).copy_(self.bad)
        return out.index_copy_(0, self.index, x)[:tokens]

    def poison(self, x: Tensor) -> Tensor:
        """NaN when `num_active` was too small: never a partial result."""
        return x if self.bad is None else x + self.bad


def compact(
    backend: str, mask: Tensor | None, tokens: int, num_active: int | None, device: torch.device
) -> Rows:
    """Positions of the active tokens without a synchronisation, when their number is given."""
    if num_active is None or (mask is not None and num_active >= tokens) or tokens == 0:
        return Rows(None, None, mask, None)
    if mask is None:
        few = num_active < tokens
        return Rows(None, None, None, torch.full((), torch.nan, device=device) if few else None)
    if mask.is_cuda and backend != "triton":
        index, source, use, bad = torch.ops.klq.compact_tokens(mask, num_active)
        return Rows(index, source, use, bad)
    index = torch.nonzero_static(mask, size=num_active, fill_value=tokens).squeeze(-1)
    bad = torch.where(mask.sum() > num_active, torch.nan, 0.0)
    return Rows(index, index.clamp(max=tokens - 1), index < tokens, bad)


@torch.library.register_fake("klq::compact_tokens")
def _(mask, size):
    index = mask.new_empty(size, dtype=torch.int64)
    bad = mask.new_empty((), dtype=torch.float32)
    return index, torch.empty_like(index), mask.new_empty(size), bad
