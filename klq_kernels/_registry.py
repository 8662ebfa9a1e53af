# SPDX-License-Identifier: Apache-2.0
"""Every op as data: what it takes, what it costs, how exact it must be.

Tests and benchmarks enumerate `SPECS` and name no op by hand, so an op added here or a backend
added to `_dispatch.TABLE` is covered without a change there. `_samples` has the inputs.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import klq_kernels
from klq_kernels._samples import CASES, Case, world


class Cost(NamedTuple):
    """The least an op can do: each input read once, each result written once."""

    bytes: int
    flops: int
    backward_bytes: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class OpSpec:
    name: str
    takes: tuple[str, ...]  # tensors of the world
    kind: str  # "rows", "scan", "targets" (rows, then scan) or "linear"
    scalars: dict = field(default_factory=dict)
    grads: tuple[str, ...] = ()  # inputs that receive gradients
    one_backward: bool = False  # hands its gradient over: a second backward raises
    # floating point operations a (token, vocabulary entry), or a token for scans: forward, backward
    work: tuple[int, int] = (4, 0)

    @property
    def function(self) -> Callable:
        return getattr(klq_kernels, self.name)

    @property
    def cases(self) -> list[Case]:
        return [c for c in CASES if self.kind in c.kinds and set(c.needs) <= set(self.takes)]

    def inputs(self, device="cpu", dtype=torch.float32, case: Case | None = None, **size) -> dict:
        """Keyword arguments of one call; `size` (leading, vocabulary, ...) for benchmarks."""
        case = case or CASES[0]
        made = world(device, dtype, **{**case.size, **size})
        case.edit(made)
        optional = set(case.drop)
        args = {k: v for k, v in made.items() if k in self.takes and k not in optional}
        allowed = set(inspect.signature(self.function).parameters)
        scalars = {k: v for k, v in {**self.scalars, **case.scalars}.items() if k in allowed}
        if self.kind == "rows" and "returns" in args:
            away_from_q(args, scalars)
        return {
            **args,
            **{k: v for k, v in scalars.items() if not (k == "lam" and "trace" in args)},
        }

    def cost(self, inputs: dict, outputs) -> Cost:
        """Bytes and floating point operations of a call with these inputs and outputs."""
        read = sum(_bytes(x) for x in inputs.values() if isinstance(x, Tensor))
        written = sum(_bytes(x) for x in tensors_of(outputs))
        grads = sum(_bytes(inputs[name]) for name in self.grads if inputs.get(name) is not None)
        forward, backward = self.work
        if self.kind == "linear":
            units = inputs["hidden"].numel() * inputs["weight"].shape[0]
        elif self.kind == "scan":
            units = max(x.numel() for x in inputs.values() if isinstance(x, Tensor))
        else:
            units = inputs["q" if "q" in inputs else "logits"].numel()
        read_again = 0 if self.one_backward or self.name == "klq_loss" else grads
        back = (grads + read_again, backward * units) if grads else (0, 0)
        return Cost(read + written, forward * units, *back)


def away_from_q(args: dict, scalars: dict) -> None:
    """Moves returns that are near Q away from it, where they lie: rule 7 is for coefficients of
    order one, and a residual that cancels has more error than any bound on its row."""
    keys = ("actions", "mask", "temperature", "logit_softcap")
    how = {k: v for k, v in {**args, **scalars}.items() if k in keys}
    logprobs = klq_kernels.token_logprobs(args["logits"].double(), **how, backend="reference")
    q = scalars["tau"] * (logprobs - args["ref_logprobs"].double()) + args["values"].double()
    residual = q - args["returns"].double()
    sign = torch.where(residual < 0, -1.0, 1.0)
    # also of the order of what it is a difference of: a log-prob is rounded to float32
    most = torch.where(logprobs.isfinite(), logprobs.abs(), 0.0)
    least = (scalars["tau"] * most).clamp(min=2.0 * max(1.0, scalars["tau"]))
    far = q - sign * (residual.abs() + least)
    near = residual.abs() < least
    args["returns"].copy_(torch.where(near, far, args["returns"].double()))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def tensors_of(outputs) -> list[Tensor]:
    """The tensors of a result, in order, through nested named tuples."""
    if outputs is None or isinstance(outputs, Tensor):
        return [] if outputs is None else [outputs]
    return [t for x in outputs for t in tensors_of(x)]


_SCAN = {"tau": 0.3, "gamma": 0.97, "lam": 0.9, "alpha": 0.7}
_SEQS = ("mask", "cu_seqlens", "bootstrap")
_HEAD = ("hidden", "weight", "bias", "actions", "mask")
_LOSS = ("values", "ref_logprobs", "returns", "weights")

SPECS = {
    s.name: s
    for s in (
        OpSpec(
            "token_logprobs", ("logits", "actions", "mask"), "rows", grads=("logits",), work=(4, 4)
        ),
        OpSpec(
            "token_log_ratios",
            ("logits", "ref_logits", "actions", "mask"),
            "rows",
            grads=("logits",),
            work=(8, 4),
        ),
        OpSpec("token_stats", ("logits", "actions", "ref_logits", "mask"), "rows", work=(12, 0)),
        OpSpec("q_values", ("logits", "ref_logits", "values"), "rows", {"tau": 0.3}, work=(12, 0)),
        OpSpec("boltzmann_values", ("q", "ref_logits"), "rows", {"tau": 0.3}, work=(10, 0)),
        OpSpec(
            "lambda_returns",
            ("log_ratios", "values", "rewards", "lam", "trace", *_SEQS),
            "scan",
            _SCAN,
            work=(8, 0),
        ),
        OpSpec("gae", ("rewards", "values", *_SEQS), "scan", _SCAN, work=(5, 0)),
        OpSpec("place_scores", ("scores", "mask", "cu_seqlens"), "scan", work=(0, 0)),
        OpSpec(
            "klq_targets",
            ("logits", "actions", "values", "rewards", "ref_logits", "lam", *_SEQS),
            "targets",
            _SCAN,
            work=(8, 0),
        ),
        OpSpec(
            "klq_loss",
            ("logits", "actions", "mask", *_LOSS),
            "rows",
            {"tau": 0.7, "normalizer": 1.0},
            grads=("logits", "values"),
            work=(8, 0),
        ),
        OpSpec(
            "linear_token_logprobs",
            _HEAD,
            "linear",
            grads=("hidden", "weight", "bias"),
            work=(2, 6),
        ),
        OpSpec("linear_token_stats", _HEAD, "linear", work=(2, 0)),
        OpSpec(
            "linear_klq_loss",
            (*_HEAD, *_LOSS),
            "linear",
            {"tau": 0.7, "normalizer": 1.0},
            grads=("hidden", "weight", "bias", "values"),
            one_backward=True,
            work=(6, 0),
        ),
    )
}


# --- how exact: rule 7 of the specification ---------------------------------------------------

# Beyond twice the error of PyTorch's own float32 result: 2^-22 of the largest magnitude. float64
# has no better truth to be held against than another float64 sum.
_MARGIN = {torch.float64: 2.0**-46}
_ROUNDOFF = {torch.float64: 2.0**-53}


def margin(dtype: torch.dtype) -> float:
    return _MARGIN.get(dtype, 2.0**-22)


def largest(x: Tensor) -> float:
    """max |x| over finite entries, 0 without any."""
    x = x.detach().double().abs()
    x = x[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


def error(x: Tensor, truth: Tensor) -> float:
    """max |x - truth| over entries whose truth is finite."""
    finite = truth.isfinite()
    return largest(x.double()[finite] - truth.double()[finite])


def row_bound(baseline: Tensor, truth: Tensor, scale: float, dtype: torch.dtype) -> float:
    """Log-probs and what is made of them: twice PyTorch's error, and the margin times `scale`."""
    return 2 * error(baseline, truth) + margin(dtype) * scale


def gradient_bound(name: str, baseline: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Twice the error of PyTorch's gradient in the same dtype, and the margin times the largest
    entry; both per token for [..., V] and [..., D], over everything else as a whole (a row of dW
    belongs to one vocabulary entry of every token). Counts entries PyTorch has finite.

    In float64 the truth's own onehot - softmax cancels: the margin counts from 1 there. A gradient
    that is rounded on the way may be off by an ulp of the largest entry more, in one entry: what
    all of them may be off by is `norm_bound`.
    """
    if truth.numel() == 0:
        return truth.abs()
    dim = -1 if name in ("logits", "hidden") else tuple(range(truth.dim()))
    counts = baseline.isfinite()
    off = torch.where(counts, (baseline.double() - truth).abs(), 0.0).amax(dim, keepdim=True)
    scale = torch.where(counts, truth.abs(), 0.0).amax(dim, keepdim=True)
    scale = scale.clamp(min=1.0) if dtype == torch.float64 else scale
    return 2 * off + (margin(dtype) + 2.0**-8 * rounded_on_the_way(name, dtype)) * scale


def rounded_on_the_way(name: str, dtype: torch.dtype) -> bool:
    """Whether a gradient comes through a 16-bit head, which rounds logits and their gradients."""
    return name in ("hidden", "weight", "bias") and dtype in (torch.bfloat16, torch.float16)


def norm_bound(baseline: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Of the error's norm, for gradients that are rounded on the way: twice that of PyTorch's, and
    the margin times the gradient's. Every implementation draws roundings of its own, so that twice
    the largest of one draw is no bound for another's largest; over all entries they average."""
    counts = baseline.isfinite()
    off, truth = (torch.where(counts, x, 0.0) for x in (baseline.double() - truth, truth.double()))
    return float(2 * off.norm() + margin(dtype) * truth.norm())


def scan_bounds(
    inputs: dict, q: Tensor, dtype: torch.dtype, ratio_bound: float = 0.0
) -> dict[str, Tensor]:
    """For every token 2 u (log2 T + 16) (sum_k (gamma lam)^{k-t} (|r_k| + |V_k| + |Q_k|) +
    gamma (gamma lam)^{n-1} |bootstrap|); a log-ratio that is off by `ratio_bound` adds its own
    weighted sum. Inputs and `q` in float64.
    """
    names = ("gamma", "lam", "trace", "mask", "cu_seqlens")
    how = {k: inputs[k] for k in names if inputs.get(k) is not None}
    boot, v = inputs.get("bootstrap"), inputs["values"]

    def weighted(x: Tensor, boot: Tensor | None) -> Tensor:
        zero = torch.zeros_like(v)
        run = klq_kernels.lambda_returns
        return run(zero, zero, x, tau=0.0, bootstrap=boot, backend="reference", **how).advantages

    terms = inputs["rewards"].abs() + v.abs() + q.abs()
    steps = math.log2(max(2, v.shape[-1])) + 16
    u = 2 * _ROUNDOFF.get(dtype, 2.0**-24) * steps
    own = u * weighted(terms, None if boot is None else boot.abs())
    extra = inputs.get("tau", 0.0) * ratio_bound
    a = own + (extra * weighted(torch.ones_like(v), None) if extra else 0.0)
    return {"q": own + extra, "advantages": a, "returns": a + extra}
