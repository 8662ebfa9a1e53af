# SPDX-License-Identifier: Apache-2.0
"""Runs an op on a backend and holds it against the float64 reference on the same, rounded, inputs.

The bounds are those of `klq_kernels._registry`; nothing here is a tolerance.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import klq_kernels
from klq_kernels import _dispatch
from klq_kernels._registry import (
    SPECS,
    OpSpec,
    error,
    gradient_bound,
    largest,
    margin,
    norm_bound,
    rounded_on_the_way,
    row_bound,
    scan_bounds,
)
from klq_kernels._samples import PER_SEQUENCE, PER_TOKEN, Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GARBAGE = (torch.nan, torch.inf, -torch.inf, 1e38)
# operators: parts of the LM-head ops, met on a CUDA device only, most of them on Hopper
CUDA_ONLY = {"linear_rows_", "linear_hidden_", "linear_weight_", "linear_chosen_"}
CUDA_ONLY |= {"linear_dlogits_", "klq_loss_tokens", "compact_tokens"}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def backends(op: str, device: str) -> list[str]:
    """Every backend that has this op on this device and can run here."""
    ready = [b for b, ok in _dispatch.available_backends().items() if ok is True]
    kernels = _dispatch.TABLE[op]
    return [b for b in ready if b == "reference" or device in kernels.get(b, ())]


def present() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def grid(*, cases: str | None = None, dtypes=DTYPES, only=lambda spec: True, compiled=False):
    """parametrize arguments over op x device x backend x dtype (x case); `compiled` leaves the
    reference out."""
    out = []
    for spec in SPECS.values():
        if not only(spec):
            continue
        for device in present():
            marks = [pytest.mark.gpu] if device == "cuda" else []
            wanted = [c for c in spec.cases if cases is None or c.name in cases.split()]
            for backend in backends(spec.name, device):
                if compiled and backend == "reference":
                    continue
                for dtype in dtypes:
                    if dtype == torch.float64 and backend not in ("reference", "cpp"):
                        continue
                    for case in wanted:
                        name = "-".join((spec.name, case.name, device, backend, short(dtype)))
                        out.append(
                            pytest.param(spec, case, device, backend, dtype, id=name, marks=marks)
                        )
    return pytest.mark.parametrize(("spec", "case", "device", "backend", "dtype"), out)


def everywhere(*ops: str):
    """parametrize arguments (device, backend) over all places where every one of `ops` runs."""
    pairs = []
    for device in present():
        marks = [pytest.mark.gpu] if device == "cuda" else []
        shared = [b for b in backends(ops[0], device) if all(b in backends(o, device) for o in ops)]
        pairs += [pytest.param(device, b, id=f"{device}-{b}", marks=marks) for b in shared]
    return pytest.mark.parametrize(("device", "backend"), pairs)


def takes(name: str):
    return lambda spec: name in spec.takes


class Run(NamedTuple):
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def flatten(result, prefix: str = "") -> dict[str, Tensor]:
    if result is None:
        return {}
    if isinstance(result, Tensor):
        return {prefix or "out": result}
    named = result._asdict().items()
    return {k: v for name, x in named for k, v in flatten(x, name).items()}


def upstream_like(out: Tensor, seed: int = 1) -> Tensor:
    """Coefficients of order one for every element; 1 for a loss."""
    if out.dim() == 0:
        return torch.ones_like(out)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(out.shape, generator=generator, dtype=torch.float32)
    return random.to(out.device, out.dtype)


def run(spec: OpSpec, inputs: dict, backend: str, upstream: Tensor | None = None) -> Run:
    """Outputs, and the gradients of every input that receives one."""
    args = dict(inputs)
    leaves = {}
    for name in spec.grads:
        if args.get(name) is not None:
            leaves[name] = args[name] = args[name].detach().requires_grad_()
    result = spec.function(**args, backend=backend)
    outputs = flatten(result)
    grads = {}
    if leaves:
        out = next(iter(outputs.values()))
        given = upstream_like(out) if upstream is None else upstream.to(out.dtype)
        made = torch.autograd.grad(out, list(leaves.values()), given)
        grads = dict(zip(leaves, made, strict=True))
    return Run({k: v.detach() for k, v in outputs.items()}, grads)


def doubled(inputs: dict) -> dict:
    """The same numbers in float64."""
    floating = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    out = {k: v.double() if k in floating else v for k, v in inputs.items()}
    out.pop("logits_dtype", None)
    return out


def clone(inputs: dict) -> dict:
    """Fresh memory for every tensor, strides as they were where they do not overlap."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included, and the sign of zero too."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if not a.is_floating_point():
        return torch.equal(a, b)
    kind = kinds[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def assert_same(a: Run, b: Run, what: str) -> None:
    for name in a.outputs:
        assert same_bits(a.outputs[name], b.outputs[name]), f"{what}: {name} changed"
    for name in a.grads:
        assert same_bits(a.grads[name], b.grads[name]), f"{what}: gradient of {name} changed"


def log_prob_scale(inputs: dict) -> float:
    """max |log pi| of the chosen tokens, in the policy and the reference."""
    if not {"logits", "actions"} <= set(inputs):
        return 0.0
    keys = ("actions", "mask", "temperature", "logit_softcap")
    how = {k: v for k, v in inputs.items() if k in keys}
    both = [inputs[k].double() for k in ("logits", "ref_logits") if k in inputs]
    run = klq_kernels.token_logprobs
    return max(largest(run(z, **how, backend="reference")) for z in both)


def bounds(spec: OpSpec, inputs: dict, truth: dict, baseline: dict, dtype) -> dict:
    """Rule 7 for every output of `spec`: a number, or one number a token."""
    out = {}
    ratio, chosen = 0.0, log_prob_scale(inputs)
    for name, t in truth.items():
        scale = largest(t)
        if spec.kind != "scan" and name in ("out", "kl", "entropy", "log_ratios"):
            scale = max(scale, chosen)  # differences and means of log-probs
        out[name] = row_bound(baseline[name], t, scale, dtype)
        if name in ("logprobs", "ref_logprobs"):
            ratio += out[name]
    if spec.kind in ("scan", "targets") and "values" in inputs:
        q = truth.get("q", inputs["values"].double())
        out |= scan_bounds(doubled(inputs), q, dtype, ratio)
    if spec.name == "linear_klq_loss" and dtype in (torch.bfloat16, torch.float16):
        for name, more in sums_bounds(inputs, truth).items():
            out[name] += min(more, 2.0**-10 * largest(truth[name]))  # and never coarser than that
    return {name: out[name] for name in truth}


def sums_bounds(inputs: dict, truth: dict) -> dict:
    """What log-probs of rounded logits do to the loss and its sums, if the norm of their error is
    at most twice that of PyTorch's: a sum of squared residuals is a norm squared, and the residuals
    move by tau times the log-probs; e on the norm x is e (2 x + e) on its square."""
    names = ("hidden", "weight", "bias", "actions", "mask", "temperature", "logit_softcap")
    head = {k: v for k, v in inputs.items() if k in names}
    run = klq_kernels.linear_token_logprobs
    off = run(**head, backend="reference").double() - run(**doubled(head), backend="reference")
    weights = inputs.get("weights", torch.ones_like(off)).double() / inputs["normalizer"]
    out = {"logprob": float(2 * off.norm() * off.numel() ** 0.5)}
    for name, x in (("loss", off * weights.sqrt()), ("residual_sq", off)):
        e = 2 * inputs["tau"] * float(x.norm())
        out[name] = e * (2 * float(truth[name]) ** 0.5 + e)
    return out


def check_outputs(spec: OpSpec, inputs: dict, got: dict, truth: dict, baseline: dict, dtype):
    allowed = bounds(spec, inputs, truth, baseline, dtype)
    for name, t in truth.items():
        x = got[name].double()
        assert x.shape == t.shape, f"{name}: shape {list(x.shape)}, expected {list(t.shape)}"
        finite = t.isfinite()
        assert torch.equal(x.isfinite(), finite), f"{name}: finite elsewhere than the truth"
        special = ~finite
        assert torch.equal(x[special].isnan(), t[special].isnan()), f"{name}: NaN elsewhere"
        signs = special & ~t.isnan()
        assert torch.equal(x[signs], t[signs]), f"{name}: infinities differ"
        if t.numel() == 0:
            continue
        limit = torch.as_tensor(allowed[name], device=t.device).expand(t.shape)
        off = torch.where(finite, (x - t).abs(), 0.0)
        worst = (off - limit).argmax()
        assert (off <= limit).all(), (
            f"{name}: off by {off.flatten()[worst]:.3e}, allowed {limit.flatten()[worst]:.3e} "
            f"(PyTorch's own error {error(baseline[name], t):.3e}, max {largest(t):.3e})"
        )


def check_gradients(got: dict, truth: dict, baseline: dict, dtype: torch.dtype) -> None:
    """Entries that PyTorch's own result has beyond the range of the dtype do not count."""
    for name, t in truth.items():
        x = got[name]
        assert x.dtype == baseline[name].dtype and x.shape == t.shape, name
        counts = baseline[name].isfinite()
        assert x[counts].isfinite().all(), f"gradient of {name} is not finite"
        off = torch.where(counts, (x.double() - t).abs(), 0.0)
        if rounded_on_the_way(name, dtype):
            most = norm_bound(baseline[name], t, dtype)
            what = f"gradient of {name}: off by {off.norm():.3e} (norm), allowed {most:.3e}"
            assert off.norm() <= most, what
        if t.numel():
            limit = gradient_bound(name, baseline[name], t, dtype).expand(t.shape)
            worst = (off - limit).argmax()
            assert (off <= limit).all(), (
                f"gradient of {name}: off by {off.flatten()[worst]:.3e}, allowed "
                f"{limit.flatten()[worst]:.3e} at entry {t.flatten()[worst]:.3e}"
            )


def check_row_sums(rows: Tensor) -> None:
    """onehot - softmax sums to 0: up to the rounding of each entry, plus the margin."""
    grain = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}.get(rows.dtype, 0.0)
    half_ulp = torch.finfo(rows.dtype).eps / 2
    x = rows.double()
    limit = (half_ulp + margin(rows.dtype)) * x.abs().sum(-1) + grain * x.shape[-1]
    assert (x.sum(-1).abs() <= limit).all(), f"row sums {x.sum(-1).abs().max():.3e}"


def check(spec: OpSpec, inputs: dict, backend: str, dtype: torch.dtype) -> Run:
    """`backend` against the float64 truth; returns what it gave."""
    given = clone(inputs)
    got = run(spec, inputs, backend)
    for name, x in given.items():
        if isinstance(x, Tensor):
            assert same_bits(x, inputs[name]), f"the op wrote to its input {name}"
    upstream = upstream_like(next(iter(got.outputs.values())))
    truth = run(spec, doubled(inputs), "reference", upstream)
    baseline = run(spec, inputs, "reference", upstream)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, x in got.outputs.items():
        assert x.dtype == wide, f"{name} is {x.dtype}"
        assert x.is_contiguous(), f"{name} is not contiguous"
    check_outputs(spec, inputs, got.outputs, truth.outputs, baseline.outputs, dtype)
    check_gradients(got.grads, truth.grads, baseline.grads, dtype)
    return got


def leading_of(inputs: dict) -> torch.Size:
    for name in ("actions", "values", "mask", "rewards"):
        if name in inputs:
            return inputs[name].shape
    return inputs["q"].shape[:-1]


def poison(inputs: dict, where: Tensor, garbage: float) -> dict:
    """Garbage at the tokens `where` [...] of every per-token input; ids out of any vocabulary."""
    out = dict(inputs)
    for name in PER_TOKEN:
        x = inputs.get(name)
        if x is None or name == "mask":
            continue
        at = where if x.dim() == where.dim() else where.unsqueeze(-1)
        if x.is_floating_point():
            value = min(garbage, torch.finfo(x.dtype).max) if garbage == 1e38 else garbage
        else:
            value = {torch.inf: 2**31 - 1, -torch.inf: -(2**31)}.get(garbage, -100)
        out[name] = torch.where(at, torch.full((), value, dtype=x.dtype, device=x.device), x)
    return out


def pick(inputs: dict, index) -> dict:
    """The tokens (or, padded, the sequences) `index` of every input."""
    out = dict(inputs)
    for name in (*PER_TOKEN, *PER_SEQUENCE):
        if isinstance(out.get(name), Tensor):
            out[name] = out[name][index]
    return out


def case(name: str) -> Case:
    from klq_kernels._samples import CASES

    return next(c for c in CASES if c.name == name)
