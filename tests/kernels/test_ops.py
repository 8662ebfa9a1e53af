# SPDX-License-Identifier: Apache-2.0
"""What holds for every op on every backend, device and dtype: the truth within rule 7, isolation,
determinism, autograd."""

import pytest
import torch
from oracle import (
    DTYPES,
    GARBAGE,
    assert_same,
    check,
    check_row_sums,
    flatten,
    grid,
    largest,
    leading_of,
    pick,
    poison,
    run,
    same_bits,
    takes,
    upstream_like,
)


@grid()
def test_matches_the_float64_truth(spec, case, device, backend, dtype):
    """Outputs and gradients, over every case of the registry (6-cases 11, 12, 15, 28, 39, 43-50,
    52-57, 59, 61, 72); inputs are left as they were."""
    inputs = spec.inputs(device, dtype, case)
    got = check(spec, inputs, backend, dtype)
    capped = inputs.get("logit_softcap") is not None
    if backend != "reference" and "logits" in got.grads and not capped:
        rows = got.grads["logits"]
        check_row_sums(rows[rows.isfinite().all(-1)])
    if spec.name == "token_logprobs":
        assert (got.outputs["out"] <= 0).all()
    if "mask" in inputs:
        inactive = inputs["mask"] == 0
        for name, x in got.outputs.items():
            if x.shape == inactive.shape:
                assert (x[inactive] == 0).all(), name
        for name in ("logits", "values", "hidden"):
            if name in got.grads:
                assert (got.grads[name][inactive] == 0).all(), name
    if inputs.get("mask") is not None and not inputs["mask"].any():
        for name, x in (got.outputs | got.grads).items():
            assert torch.count_nonzero(x) == 0, name


def _inactive(inputs: dict) -> torch.Tensor:
    """Tokens that do not exist: masked, or past the last sequence."""
    leading = leading_of(inputs)
    off = torch.zeros(leading, dtype=torch.bool, device=inputs[next(iter(inputs))].device)
    if inputs.get("mask") is not None:
        off |= inputs["mask"] == 0
    if inputs.get("cu_seqlens") is not None:
        off |= torch.arange(leading[0], device=off.device) >= inputs["cu_seqlens"][-1]
    return off


@pytest.mark.parametrize("garbage", GARBAGE)
@grid(cases="plain packed strided compacted capped", dtypes=DTYPES[:3], only=takes("mask"))
def test_inactive_inputs_do_not_exist(spec, case, device, backend, dtype, garbage):
    """Rule 5, 6-cases 5, 6, 46, 55: garbage in every inactive slot of every input."""
    inputs = spec.inputs(device, dtype, case)
    off = _inactive(inputs)
    assert off.any() and not off.all()
    clean = run(spec, inputs, backend)
    assert_same(clean, run(spec, poison(inputs, off, garbage), backend), f"{garbage} inactive")


@grid(cases="all_masked packed_empty", dtypes=(torch.float32, torch.float16), only=takes("mask"))
def test_nothing_active_ignores_everything(spec, case, device, backend, dtype):
    """Rules 2 and 9, 6-cases 7 and 53: with no active token all is 0, whatever bootstrap is."""
    inputs = spec.inputs(device, dtype, case)
    for name in ("bootstrap", "scores"):
        if name in inputs:
            inputs[name] = torch.full_like(inputs[name], torch.nan)
    inputs = poison(inputs, _inactive(inputs), torch.nan)
    got = run(spec, inputs, backend)
    for name, x in (got.outputs | got.grads).items():
        assert torch.count_nonzero(x) == 0, name


@grid(cases="plain packed", dtypes=(torch.float32,))
def test_a_bad_token_stays_in_its_sequence(spec, case, device, backend, dtype):
    """Rule 5, 6-case 61: an active NaN reaches its own row, and of its own sequence only what comes
    before it."""
    inputs = spec.inputs(device, dtype, case)
    inputs.pop("mask", None) if spec.name != "place_scores" else None
    leading = leading_of(inputs)
    at = (0, 2) if len(leading) == 2 else (3,)  # packed: the first sequence with tokens is 0:5
    where = torch.zeros(leading, dtype=torch.bool, device=device)
    where[at] = True
    bad = dict(inputs)
    for name, x in poison(inputs, where, torch.nan).items():
        bad[name] = x if name not in ("actions", "mask") else inputs[name]
    clean, got = run(spec, inputs, backend), run(spec, bad, backend)
    kept = ~where
    if spec.kind in ("scan", "targets"):
        kept[(*at[:-1], slice(0, at[-1] + 1))] = False
    for name, x in clean.outputs.items():
        if x.shape[: kept.dim()] == kept.shape:
            assert same_bits(x[kept], got.outputs[name][kept]), name
    for name in ("logits", "hidden"):
        if name in clean.grads:
            assert same_bits(clean.grads[name][kept], got.grads[name][kept]), name


@grid(cases="plain packed banned capped strided vocabulary_4099", dtypes=DTYPES[:3], compiled=True)
def test_repeats_bit_for_bit(spec, case, device, backend, dtype):
    """6-cases 21, 66: no result depends on the run."""
    inputs = spec.inputs(device, dtype, case)
    first = run(spec, inputs, backend)
    for _ in range(5):
        assert_same(first, run(spec, inputs, backend), "another run")


@grid(cases="plain banned capped vocabulary_4099", dtypes=DTYPES[:3], compiled=True)
def test_a_row_alone_equals_the_row_in_a_batch(spec, case, device, backend, dtype):
    """6-cases 21, 66: bit for bit for row kernels, whatever its neighbours and its place; scans
    whose lanes lie on the whole tensor sum in another order, and agree to the accuracy of both."""
    if spec.kind == "linear":
        return  # the matrix product may sum in another order
    scanned = ("advantages", "returns") if backend in ("cuda", "triton") else ()
    inputs = spec.inputs(device, dtype, case)
    whole = run(spec, inputs, backend)
    rows = leading_of(inputs)[0]
    for i in range(rows):
        alone = run(spec, pick(inputs, slice(i, i + 1)), backend)
        for name, x in alone.outputs.items():
            there = whole.outputs[name][i : i + 1] if x.dim() else x
            if name in scanned:
                torch.testing.assert_close(x, there, rtol=2e-6, atol=2e-6 * largest(there))
            else:
                assert same_bits(x, there), name
        if "logits" in alone.grads and "values" in alone.grads:  # upstream is per token elsewhere
            assert same_bits(alone.grads["logits"], whole.grads["logits"][i : i + 1])


@grid(cases="plain", dtypes=(torch.float32, torch.bfloat16), compiled=True)
def test_threads_change_no_bit(spec, case, device, backend, dtype):
    """One thread and two. BLAS chooses its own order, so the LM-head ops are not held to it."""
    if spec.kind == "linear" or device != "cpu":
        return
    inputs = spec.inputs(device, dtype, leading=(31, 9), vocabulary=3001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(spec, inputs, backend)
        torch.set_num_threads(2)
        assert_same(one, run(spec, inputs, backend), "two threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("factor", [0.5, 65536.0, 0.0, -1.0])
@grid(cases="plain", dtypes=(torch.float32, torch.float64), only=lambda s: s.grads)
def test_upstream_scale(spec, case, device, backend, dtype, factor):
    """Rule 12, 6-cases 39, 40, 58: an upstream power of two scales every gradient exactly; it may
    come as an expanded scalar (stride 0), and the loss need not be the last op."""
    inputs = spec.inputs(device, dtype, case)
    out = next(iter(run(spec, inputs, backend).outputs.values()))
    one = torch.ones((), dtype=out.dtype, device=device)
    base = run(spec, inputs, backend, one.expand(out.shape))
    scaled = run(spec, inputs, backend, (one * factor).expand(out.shape))
    for name, g in base.grads.items():
        torch.testing.assert_close(scaled.grads[name], g * factor, rtol=1e-6, atol=0)

    leaves = {n: inputs[n].detach().requires_grad_() for n in spec.grads if n in inputs}
    made = spec.function(**{**inputs, **leaves}, backend=backend)
    total = (made if isinstance(made, torch.Tensor) else made[0]).sum() * factor
    grads = torch.autograd.grad(total + 3.0, list(leaves.values()))
    for name, g in zip(leaves, grads, strict=True):
        torch.testing.assert_close(g, base.grads[name] * factor, rtol=1e-6, atol=0)


@grid(cases="plain capped", dtypes=(torch.float32, torch.float16), only=lambda s: s.grads)
def test_two_backwards(spec, case, device, backend, dtype):
    """Rule 12, 6-case 41: out-of-place ops repeat exactly; a gradient handed over is refused a
    second time. (The plain PyTorch reference repeats in every case.)"""
    inputs = spec.inputs(device, dtype, case)
    leaves = [inputs[n].requires_grad_() for n in spec.grads if n in inputs]
    made = spec.function(**inputs, backend=backend)
    out = made if isinstance(made, torch.Tensor) else made[0]
    upstream = upstream_like(out)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    first = [x.clone() for x in first]
    if spec.one_backward and backend != "reference":
        with pytest.raises(RuntimeError, match=spec.name):
            torch.autograd.grad(out, leaves, upstream)
        return
    for _ in range(2):
        again = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@grid(cases="plain capped banned", dtypes=(torch.float64,), only=lambda s: s.grads)
def test_gradcheck(spec, case, device, backend, dtype):
    """Numerical differentiation in float64. Each evaluation is a new call, so that ops which serve
    one backward are checked as well."""
    size = {"leading": (2, 2), "vocabulary": 6, "width": 3}
    inputs = spec.inputs(device, dtype, case, **size)
    if "logits" in inputs and case.name == "banned":  # finite differences of -inf are NaN
        inputs["logits"] = inputs["logits"].clamp(min=-40.0)
    if "bias" in inputs and case.name == "banned":
        return
    names = [n for n in spec.grads if n in inputs]

    def loss(*leaves):
        made = spec.function(**{**inputs, **dict(zip(names, leaves, strict=True))}, backend=backend)
        return made if isinstance(made, torch.Tensor) else made[0]

    leaves = [inputs[n].detach().clone().requires_grad_() for n in names]
    out = loss(*leaves)
    given = upstream_like(out)
    exact = torch.autograd.grad(out, leaves, given)
    for leaf, grad in zip(leaves, exact, strict=True):
        numeric = torch.zeros_like(leaf)
        with torch.no_grad():
            flat, step = leaf.view(-1), 1e-6
            for i in range(flat.numel()):
                kept = flat[i].clone()
                values = []
                for sign in (1, -1):
                    flat[i] = kept + sign * step
                    values.append((loss(*leaves) * given).sum())
                flat[i] = kept
                numeric.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-7)


@grid(cases="plain packed", dtypes=(torch.float32,))
def test_no_gradient_through_targets(spec, case, device, backend, dtype):
    """G is a constant: what is not in the specification's list of gradients gets none."""
    inputs = spec.inputs(device, dtype, case)
    floating = [
        n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    for name in floating:
        inputs[name] = inputs[name].detach().requires_grad_()
    outputs = flatten(spec.function(**inputs, backend=backend))
    first = next(iter(outputs.values()))
    for name, x in outputs.items():
        assert x.requires_grad == (bool(spec.grads) and x is first), name
    if spec.grads:
        first.sum().backward()
        for name in floating:
            assert (inputs[name].grad is not None) == (name in spec.grads), name


def test_memory_is_poisoned():
    """6-case 11: what the tests above rely on to catch unwritten elements."""
    assert torch.empty(64).isnan().all()
    assert torch.empty(3, dtype=torch.float64).isnan().all()
