# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the public functions: metadata only, before any work.

Every message names the op, the argument, what was found and what was expected. What needs tensor
*values* (action ids, `lam` tensors, `cu_seqlens` ends) is looked at on the CPU, where it costs no
synchronisation, and on other devices when KLQ_VALIDATE=1; never under torch.compile.
"""

import itertools
import math
import numbers
import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shape_of(x: Tensor) -> list[int]:
    return list(x.shape)


def tensor(op: str, name: str, x) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    return x


def floating(op: str, name: str, x: Tensor) -> None:
    tensor(op, name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")


def same_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, the other inputs are on {device}")


def has_shape(op: str, name: str, x: Tensor, shape: torch.Size, like: str) -> None:
    if x.shape != shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {like}, {list(shape)}, got {shape_of(x)}"
        )


def logits(op: str, name: str, x: Tensor) -> None:
    floating(op, name, x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: {name} must be [..., V] with V >= 1, got {shape_of(x)}")
    if not readable_in_place(x):
        raise ValueError(
            f"{op}: {name} of shape {shape_of(x)} and strides {list(x.stride())} cannot be read "
            "where it lies (unit stride over the vocabulary and at most two leading strides are "
            f"needed) and is never copied in silence; pass {name}.contiguous()"
        )


def readable_in_place(x: Tensor) -> bool:
    """Unit stride over the last dimension and leading dims that collapse to two strides."""
    if x.numel() == 0:
        return True
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return False
    groups, previous = 0, None  # walk outwards; a dim that continues the previous one is free
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if previous is None or stride != previous:
            groups += 1
        previous = stride * size
    return groups <= 2


def actions(op: str, x: Tensor, leading: torch.Size, like: str = "logits without V") -> None:
    tensor(op, "actions", x)
    if x.dtype not in INTEGERS:
        raise TypeError(
            f"{op}: actions must be integers (token ids; int64, int32, int16, int8 or uint8), "
            f"got {x.dtype}"
        )
    has_shape(op, "actions", x, leading, like)


def mask(op: str, x: Tensor | None, shape: torch.Size, like: str) -> Tensor | None:
    """Checks `mask` and returns it as bool (nonzero = use)."""
    if x is None:
        return None
    tensor(op, "mask", x)
    if x.dtype.is_floating_point or x.dtype.is_complex:
        raise TypeError(
            f"{op}: mask must be bool or integers (nonzero = use), got {x.dtype}; "
            "fractional weights belong in `weights`"
        )
    has_shape(op, "mask", x, shape, like)
    return x if x.dtype == torch.bool else x != 0


def per_token(op: str, name: str, x: Tensor, shape: torch.Size, like: str) -> None:
    floating(op, name, x)
    has_shape(op, name, x, shape, like)


def number(op: str, name: str, x, low: float, high: float, *, open_low: bool = False) -> float:
    if type(x) is float and low < x <= high and x != math.inf:
        return x
    if not isinstance(x, (int, float)) and isinstance(x, numbers.Real):
        x = float(x)  # NumPy's scalars
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(x).__name__}")
    # NaN fails every comparison; math.isnan would break a graph traced with a symbolic float
    if not ((x > low if open_low else x >= low) and x <= high and x < math.inf):
        left, right = "(" if open_low else "[", "inf)" if math.isinf(high) else f"{high:g}]"
        raise ValueError(f"{op}: {name} must be in {left}{low:g}, {right}, got {x}")
    return float(x)


def tau(op: str, x, *, positive: bool = False) -> float:
    return number(op, "tau", x, 0.0, math.inf, open_low=positive)


def scaling(op: str, temperature, logit_softcap) -> tuple[float, float]:
    """(temperature, softcap) as floats; no soft-cap is 0.0, the kernels' code for it."""
    t = number(op, "temperature", temperature, 0.0, math.inf, open_low=True)
    if logit_softcap is None:
        return t, 0.0
    return t, number(op, "logit_softcap", logit_softcap, 0.0, math.inf, open_low=True)


def look_at_values(*tensors: Tensor | None) -> bool:
    """Whether tensor values may be read here: on the CPU, or anywhere with KLQ_VALIDATE=1."""
    if torch.compiler.is_compiling():
        return False
    present = [x for x in tensors if isinstance(x, Tensor)]
    if any(isinstance(x, torch._subclasses.FakeTensor) or x.is_meta for x in present):
        return False
    if os.environ.get("KLQ_VALIDATE") == "1":
        return True
    return all(x.device.type == "cpu" for x in present)


def action_values(op: str, x: Tensor, use: Tensor | None, vocabulary: int | None) -> None:
    """IndexError for an active id outside [0, V); inactive ids may be anything.

    V is None where only a slice of the vocabulary is known: then negative ids are refused.
    """
    if not look_at_values(x, use):
        return
    bad = x < 0 if vocabulary is None else (x < 0) | (x >= vocabulary)
    if use is not None:
        bad = bad & use
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{op}: actions{where} = {int(x[tuple(where)])} is outside the vocabulary "
            f"[0, {'V' if vocabulary is None else vocabulary})"
        )


def sequences(op: str, cu_seqlens: Tensor | None, shape: torch.Size) -> None:
    """`cu_seqlens` is [S + 1] int32 or int64 and goes with packed [N] inputs."""
    if cu_seqlens is None:
        if len(shape) < 1:
            raise ValueError(f"{op}: inputs must have a time dimension, got {list(shape)}")
        return
    tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens must be [S + 1], got {shape_of(cu_seqlens)}")
    if len(shape) != 1:
        raise ValueError(f"{op}: with cu_seqlens the inputs must be packed [N], got {list(shape)}")
    if look_at_values(cu_seqlens):
        ends = cu_seqlens.tolist()
        ascending = all(a <= b for a, b in itertools.pairwise(ends))
        if ends[0] != 0 or not ascending or ends[-1] > shape[0]:
            raise ValueError(
                f"{op}: cu_seqlens must start at 0, never fall and end at most at N = {shape[0]}, "
                f"got {ends if len(ends) <= 8 else [*ends[:4], '...', *ends[-3:]]}"
            )


def per_sequence(op: str, name: str, x, shape: torch.Size, cu_seqlens: Tensor | None) -> None:
    """`x` has one value a sequence: the leading dims without time, or [S]."""
    if x is None:
        return
    floating(op, name, x)
    expected = shape[:-1] if cu_seqlens is None else torch.Size([cu_seqlens.shape[0] - 1])
    if x.shape != expected:
        raise ValueError(
            f"{op}: {name} must have one value a sequence, {list(expected)}, got {shape_of(x)}"
        )


def _alike(tensors, shape: torch.Size, device: torch.device, index: int) -> torch.dtype | None:
    """Dtype of results; None unless all are floating, of this shape and on this device, whose index
    says enough where there is one."""
    made = torch.float32
    for x in tensors:
        if not isinstance(x, Tensor) or x.shape != shape:
            return None
        if x.get_device() != index or (index < 0 and x.device != device):
            return None
        if x.dtype is not torch.float32:
            if x.dtype not in FLOATS:
                return None
            made = torch.float64 if x.dtype is torch.float64 else made
    return made


def scan(
    op: str,
    tokens: dict[str, Tensor],
    mask_: Tensor | None,
    cu_seqlens: Tensor | None,
    per_sequence_: dict[str, Tensor],
) -> tuple[Tensor | None, torch.dtype]:
    """What the scans check: per-token inputs, `values` among them, and per-sequence inputs. Returns
    `mask` as bool and the dtype of results.

    Of what `at_once` does not send straight to the operator, all is compared in one cheap pass, and
    only a call that fails it is looked at argument by argument.
    """
    values = tokens["values"]
    floating(op, "values", values)
    shape, device = values.shape, values.device
    sequences(op, cu_seqlens, shape)
    per = shape[:-1] if cu_seqlens is None else torch.Size((cu_seqlens.shape[0] - 1,))
    index = values.get_device()
    made = _alike(tokens.values(), shape, device, index)
    made_rows = _alike(per_sequence_.values(), per, device, index)
    plain_mask = mask_ is None or (
        isinstance(mask_, Tensor)
        and (mask_.dtype is torch.bool and mask_.shape == shape and mask_.device == device)
    )
    there = cu_seqlens is None or cu_seqlens.device == device
    if made is not None and made_rows is not None and plain_mask and there:
        return mask_, made if made_rows is torch.float32 else made_rows
    for name, x in tokens.items():
        per_token(op, name, x, shape, "values")
    use = mask(op, mask_, shape, "values")
    for name, x in per_sequence_.items():
        per_sequence(op, name, x, shape, cu_seqlens)
    same_device(op, device, **tokens, mask=mask_, cu_seqlens=cu_seqlens, **per_sequence_)
    return use, wide(*tokens.values(), *per_sequence_.values())


def rows(
    op: str,
    logits_: Tensor,
    actions_: Tensor,
    mask_: Tensor | None,
    ref_logits: Tensor | None = None,
    **others: Tensor | None,
) -> Tensor | None:
    """The checks every op on logits rows shares; returns `mask` as bool."""
    logits(op, "logits", logits_)
    actions(op, actions_, logits_.shape[:-1])
    if ref_logits is not None:
        logits(op, "ref_logits", ref_logits)
        has_shape(op, "ref_logits", ref_logits, logits_.shape, "logits")
    use = mask(op, mask_, logits_.shape[:-1], "actions")
    same_device(op, logits_.device, actions=actions_, mask=mask_, ref_logits=ref_logits, **others)
    return use


def wide(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of results: float64 if any input is, else float32."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def trace_decay(
    op: str, lam, shape: torch.Size, cu_seqlens: Tensor | None
) -> tuple[float, Tensor | None]:
    """`lam` as (number, per-sequence tensor or None); None is the paper's 0.95."""
    if not isinstance(lam, Tensor):
        return number(op, "lam", 0.95 if lam is None else lam, 0.0, 1.0), None
    if lam.dim() == 0 and shape[:-1] != lam.shape:
        raise ValueError(f"{op}: lam must be a number or one value a sequence, got a 0-d tensor")
    per_sequence(op, "lam", lam, shape, cu_seqlens)
    if look_at_values(lam) and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"{op}: lam must be in [0, 1], the tensor given has values outside")
    return 0.0, lam


def loss_inputs(
    op: str,
    shape: torch.Size,
    values: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    weights: Tensor | None,
    normalizer: float | Tensor | None,
) -> None:
    """The per-token inputs of the losses, and their normaliser."""
    named = {"values": values, "ref_logprobs": ref_logprobs, "returns": returns, "weights": weights}
    for name, x in named.items():
        if name != "weights" or x is not None:
            per_token(op, name, x, shape, "actions")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"{op}: normalizer must be one number, got {shape_of(normalizer)}")
        if normalizer.dtype not in FLOATS + INTEGERS:
            raise TypeError(f"{op}: normalizer must be a real number, got {normalizer.dtype}")
    elif normalizer is not None:
        number(op, "normalizer", normalizer, 0.0, math.inf, open_low=True)


def as_tensor(normalizer: float | Tensor | None, like: Tensor) -> Tensor | None:
    """The normaliser as a 0-d tensor on the device, without a synchronisation."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        return normalizer.detach().reshape(()).to(wide(like))
    return like.new_full((), float(normalizer), dtype=wide(like))


def consumable(op: str, x: Tensor) -> None:
    """Whether `x` may be overwritten by its gradient."""
    remedy = "use inplace=False or pass a fresh tensor"
    if not torch.compiler.is_compiling():
        base = x if x._base is None else x._base
        if base.is_leaf and base.requires_grad:
            raise ValueError(
                f"{op}: inplace=True cannot consume a leaf that needs gradients; {remedy}"
            )
    dims = [d for d in range(x.dim()) if x.shape[d] > 1]
    for d in dims:  # each stride must step over all that smaller strides reach
        smaller = [e for e in dims if e != d and x.stride(e) <= x.stride(d)]
        if x.stride(d) <= sum((x.shape[e] - 1) * x.stride(e) for e in smaller):
            raise ValueError(
                f"{op}: inplace=True needs logits whose elements do not overlap, got shape "
                f"{shape_of(x)} with strides {list(x.stride())}; {remedy}"
            )
