# SPDX-License-Identifier: Apache-2.0
"""Tensors past 2^31 elements and past 2^32 bytes on a GPU: what comes first, what
comes last and what lies around the border, held to float64."""

import pytest
import torch
from gpu_calls import BF16, DEVICE, F32, as_in_production, each_backend
from oracle import (
    check_gradients,
    check_outputs,
    clone,
    doubled,
    pick,
    run,
    same_bits,
    upstream_like,
)
from torch import Tensor

from klq_kernels._dispatch import operator
from klq_kernels._registry import SPECS

pytestmark = [pytest.mark.gpu, each_backend]
ROWS, WIDTH = 16400, 151936  # 4.6 GiB in 16 bits; element 2^31 is in row 14134
BORDER = 2**31 // WIDTH
PITCH, NARROW = 2**30 + 7, 1000  # three rows of a view; the last begins past element 2^31
TOKENS = 2**29  # float32: 2^31 bytes
LOSS = ("actions", "values", "ref_logprobs", "returns", "tau", "mask", "weights")
ROW_OPS = [s.name for s in SPECS.values() if s.kind in ("rows", "targets")]


@pytest.fixture(autouse=True)
def memory():
    """Enough of it, and given back: other workers need it."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 24:
        pytest.skip(f"needs 24 GiB of free device memory, has {free:.1f}")
    as_in_production()
    yield
    torch.cuda.empty_cache()


def loss_in_place(logits: Tensor, inputs: dict, backend: str) -> None:
    args = [*(inputs[n] for n in LOSS), torch.ones((), device=DEVICE)]
    operator(backend, "klq_loss_")(logits, *args, 1.0, 0.0)


@pytest.mark.parametrize("op", ROW_OPS)
def test_case_22_and_51_logits_past_2_31_elements(backend, op):
    """Out of place for every op; the loss in place as well."""
    spec = SPECS[op]
    block = torch.empty(ROWS + 1, WIDTH, dtype=BF16, device=DEVICE).normal_()
    inputs = spec.inputs(DEVICE, BF16, leading=(ROWS,), vocabulary=8)
    inputs.pop("bootstrap", None)
    big = {"logits": block[:-1], "ref_logits": block[1:]}  # of one memory
    if op == "boltzmann_values":
        big["q"] = torch.empty(ROWS, WIDTH, dtype=F32, device=DEVICE).normal_()
    inputs.update({k: x for k, x in big.items() if k in inputs})
    del big
    if "actions" in inputs:
        inputs["actions"] = torch.randint(WIDTH, (ROWS,), device=DEVICE)
    if "mask" in inputs:
        inputs["mask"][[0, BORDER, ROWS - 1]] = True
    if "returns" in inputs:  # made for other logits: far from what Q is now
        inputs["returns"] += 20.0
    around = range(BORDER - 3, BORDER + 4)
    rows = torch.tensor([0, 1, 2, *around, *range(ROWS - 6, ROWS)], device=DEVICE)
    near = clone(pick(inputs, rows))
    got = run(spec, inputs, backend)
    given = None
    if spec.grads:
        upstream = upstream_like(next(iter(got.outputs.values())))
        given = upstream[rows] if upstream.dim() else upstream
    made = {k: x[rows] for k, x in got.outputs.items() if x.dim()}
    if op == "klq_targets":  # the scan of these rows alone is another one
        made = {k: made[k] for k in ("logprobs", "ref_logprobs", "log_ratios")}
    grads = {k: x[rows] for k, x in got.grads.items()}
    del got
    truth = run(spec, doubled(near), "reference", given)
    plain = run(spec, near, "reference", given)
    check_outputs(spec, near, made, {k: truth.outputs[k] for k in made}, plain.outputs, BF16)
    check_gradients(grads, truth.grads, plain.grads, BF16)
    if op == "klq_loss":
        after = block[-1].clone()
        loss_in_place(inputs["logits"], inputs, backend)
        assert torch.equal(inputs["logits"][rows], grads["logits"])
        assert same_bits(block[-1], after)


def test_case_51_views_whose_last_row_begins_past_2_31_elements(backend):
    """Log-probs with their gradient, and the loss in place with what lies beside its rows."""
    flat = torch.zeros(2 * PITCH + 2 * NARROW, dtype=BF16, device=DEVICE)
    view = flat.as_strided((3, NARROW), (PITCH, 1))
    view.copy_(torch.randn(3, NARROW, device=DEVICE))
    inputs = SPECS["klq_loss"].inputs(DEVICE, BF16, leading=(3,), vocabulary=NARROW)
    inputs["mask"] = torch.tensor([True, False, True], device=DEVICE)
    near, far = {**inputs, "logits": view.contiguous()}, {**inputs, "logits": view}
    for op in ("token_logprobs", "klq_loss"):
        spec = SPECS[op]
        a, b = (
            run(spec, {k: x[k] for k in (*spec.takes, *spec.scalars) if k in x}, backend)
            for x in (near, far)
        )
        for made, want in ((a.outputs, b.outputs), (a.grads, b.grads)):
            assert all(same_bits(made[k], want[k]) for k in want), op
    starts = [i * PITCH + NARROW for i in range(3)] + [i * PITCH - NARROW for i in (1, 2)]
    loss_in_place(view, inputs, backend)
    assert torch.equal(view, b.grads["logits"])
    for start in starts:
        assert torch.count_nonzero(flat[start : start + NARROW]) == 0


def scan_inputs(op: str, shape: tuple[int, ...], sequences: int) -> dict:
    spec = SPECS[op]
    inputs = dict(spec.scalars) if op != "gae" else {"gamma": 0.97, "lam": 0.9}
    for name in ("log_ratios", "values", "rewards"):
        if name in spec.takes:
            inputs[name] = torch.randn(shape, device=DEVICE)
    inputs["mask"] = torch.rand(shape, device=DEVICE) < 0.7
    for name in ("bootstrap", "scores"):
        if name in spec.takes:
            inputs[name] = torch.randn(sequences, device=DEVICE)
    return inputs if op != "place_scores" else {k: inputs[k] for k in ("scores", "mask")}


def hold(op: str, near: dict, made: dict[str, Tensor]) -> None:
    """On the CPU, where the reference's loop over tokens is quick."""
    spec = SPECS[op]
    near = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in near.items()}
    made = {k: x.cpu() for k, x in made.items()}
    truth, plain = run(spec, doubled(near), "reference"), run(spec, near, "reference")
    check_outputs(spec, near, made, truth.outputs, plain.outputs, F32)


@pytest.mark.parametrize("op", [s.name for s in SPECS.values() if s.kind == "scan"])
@pytest.mark.parametrize("kind", ["rows", "long", "packed"])
def test_case_22_scans_past_2_31_bytes(backend, op, kind):
    """Rows, two rows of 2^28 tokens, and packed sequences with a tail that belongs to none."""
    if kind == "rows":
        shape = (TOKENS // 1024 + 64, 1024)
        inputs = scan_inputs(op, shape, shape[0])
        got = run(SPECS[op], inputs, backend).outputs
        for at in (slice(0, 2), slice(shape[0] - 2, shape[0])):
            hold(op, pick(inputs, at), {k: x[at] for k, x in got.items()})
    elif kind == "long":
        inputs = scan_inputs(op, (2, TOKENS // 2 + 5000), 2)
        got = run(SPECS[op], inputs, backend).outputs
        end = (slice(None), slice(-2000, None))
        tokens = {k: x for k, x in inputs.items() if isinstance(x, Tensor) and x.dim() == 2}
        near = {**inputs, **{k: x[end] for k, x in tokens.items()}}
        hold(op, near, {k: x[end] for k, x in got.items()})
        if op == "place_scores":
            return
        begin = {k: x[:, :3000].cpu() for k, x in tokens.items()}
        rest = {k: x for k, x in inputs.items() if not isinstance(x, Tensor)}
        truth = run(SPECS[op], doubled({**begin, **rest}), "reference").outputs
        for name, x in got.items():  # what 2000 tokens of decay 0.87 leave of the rest is 0
            x, y = x[:, :1000].cpu().double(), truth[name][:, :1000]
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    else:
        last = TOKENS + 4096
        ends = torch.arange(0, last + 1, 1024, device=DEVICE)
        inputs = scan_inputs(op, (last + 904,), len(ends) - 1)
        got = run(SPECS[op], {**inputs, "cu_seqlens": ends}, backend).outputs
        assert all(torch.count_nonzero(x[last:]) == 0 for x in got.values())
        for first in (0, len(ends) - 3):
            at = slice(first * 1024, (first + 2) * 1024)
            near = {k: x[at] if isinstance(x, Tensor) else x for k, x in inputs.items()}
            for name in ("bootstrap", "scores"):
                if name in inputs:
                    near[name] = inputs[name][first : first + 2]
            near["cu_seqlens"] = torch.tensor([0, 1024, 2048])
            hold(op, near, {k: x[at] for k, x in got.items()})
