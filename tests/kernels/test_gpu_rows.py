# SPDX-License-Identifier: Apache-2.0
"""Row kernels on a GPU at every vocabulary where they change their plan, on layouts with canaries
around them, and with more rows than fit at once; held to float64.

What an op allocates itself has no canaries here: that is compute-sanitizer's (`make sanitize`)."""

import pytest
import torch
from gpu_calls import BF16, DEVICE, F16, F32, each_backend, on
from oracle import (
    Run,
    check,
    check_gradients,
    check_outputs,
    doubled,
    pick,
    poison,
    run,
    same_bits,
    upstream_like,
)
from torch import Tensor

from klq_kernels._dispatch import operator
from klq_kernels._registry import SPECS, away_from_q

pytestmark = pytest.mark.gpu
CAPPED = {"temperature": 0.7, "logit_softcap": 30.0}
VOCABULARIES = [
    *(*range(1, 10), 63, 64, 65, 511, 512, 513),
    *(4095, 4096, 4097, 8191, 8192, 8193, 16383, 16384, 16385),
    *(32000, 50257, 50304, 65537, 128256, 131073, 151936, 262144, 300001),
]
# two, four and eight blocks a row; 13 stages of 8 blocks are full; read twice
PLACES = [
    *(on("cuda", v, dtype) for v in VOCABULARIES for dtype in (BF16, F16, F32)),
    *(on("cuda", v, F32) for v in (163841, 400000, 425984, 425985)),
    *(on("cuda", v, BF16) for v in (851968, 851969)),
    *(on("triton", v, dtype) for v in (9, 513, 50257, 151936) for dtype in (BF16, F32)),
]


@pytest.fixture(autouse=True)
def memory():
    """Other workers need it."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2 << 30:
        torch.cuda.empty_cache()


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    """Any bits, NaN among them: what lies next to a tensor must neither be read nor written."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limit = torch.iinfo(bits).max
    return torch.randint(-limit, limit, shape, dtype=bits, device=DEVICE).view(dtype)


def laid(x: Tensor, layout: str, offset: int = 1) -> tuple[Tensor, Tensor]:
    """x [a, b, V] as a view, and the block of noise it lies in."""
    if layout == "strides":  # like logits[:, p - 1 : -1]
        block = noise(x.shape[0], x.shape[1] + 3, x.shape[2], dtype=x.dtype)
        view = block[:, 2:-1]
    else:
        block = noise(x.numel() + 128, dtype=x.dtype)
        start = 64 + (offset if layout == "odd" else 0)
        view = block[start : start + x.numel()].view(x.shape)
    view.copy_(x)
    return view, block


def assert_only(view: Tensor, block: Tensor, before: Tensor) -> None:
    """Nothing but `view` has changed since `block` was `before`."""
    before.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
    assert same_bits(block, before), "memory beside the view was written"


def masked_nan(op: str, dtype: torch.dtype, vocabulary: int, leading, scalars: dict) -> dict:
    """Inputs of an op whose inactive tokens are NaN, ids too; coefficients of order one."""
    inputs = SPECS[op].inputs(DEVICE, dtype, leading=leading, vocabulary=vocabulary)
    inputs["mask"][0, 0], inputs["mask"][0, 1] = True, False
    inputs["actions"][0, 0], inputs["actions"][-1, -1] = vocabulary - 1, 0
    if op == "klq_loss":
        away_from_q(inputs, {**SPECS[op].scalars, **scalars})
    return poison(inputs, ~inputs["mask"], torch.nan)


def in_place(inputs: dict, backend: str, want: Run, layout: str, scalars: dict) -> None:
    """The same numbers in the logits' own memory, and nothing beside it."""
    z, block = laid(inputs["logits"], layout)
    before = block.clone()
    names = ("actions", "values", "ref_logprobs", "returns", "tau", "mask", "weights")
    args = [inputs[n] for n in names] + [z.new_ones((), dtype=F32)]
    t, cap = scalars.get("temperature", 1.0), scalars.get("logit_softcap", 0.0)
    loss, _, dvalues, unscale = operator(backend, "klq_loss_")(z, *args, t, cap)
    operator(backend, "klq_loss_backward_")(z, unscale, torch.ones_like(loss))
    assert same_bits(loss, want.outputs["loss"])
    assert torch.equal(dvalues.to(inputs["values"].dtype), want.grads["values"])
    assert torch.equal(z, want.grads["logits"])
    assert_only(z, block, before)


@pytest.mark.parametrize("layout", ["aligned", "odd", "strides"])
@pytest.mark.parametrize(("backend", "vocabulary", "dtype"), PLACES)
def test_vocabularies_around_every_plan(backend, vocabulary, dtype, layout):
    """6-cases 47, 50, 57: log-probs with their gradient, statistics against a reference of another
    alignment and of another dtype, the loss in and out of place; NaN in masked rows."""
    leading = (2, 3) if vocabulary > 60000 else (3, 8)
    other = BF16 if dtype == F32 else F32
    cuda = [
        (op, how) for op in ("token_logprobs", "token_stats", "klq_loss") for how in ({}, CAPPED)
    ]
    for op, scalars in cuda if backend == "cuda" else (cuda[0], cuda[2], cuda[5]):
        inputs = masked_nan(op, dtype, vocabulary, leading, scalars)
        where = {"logits": laid(inputs["logits"], layout)}
        if op == "token_stats":
            where["ref_logits"] = laid(inputs["ref_logits"], layout, 3)
        inputs = {**inputs, **{name: view for name, (view, _) in where.items()}, **scalars}
        before = {name: block.clone() for name, (_, block) in where.items()}
        got = check(SPECS[op], inputs, backend, dtype)
        if op == "token_stats":
            mixed = {**inputs, "ref_logits": inputs["ref_logits"].to(other)}
            check(SPECS[op], mixed, backend, dtype)
        for name, (_, block) in where.items():
            assert same_bits(block, before[name]), f"the op wrote to {name} or beside it"
        if op == "klq_loss":
            in_place(inputs, backend, got, layout, scalars)


def check_slices(spec, inputs: dict, backend: str, dtype, size: int) -> None:
    """`check`, with the truth made for `size` leading elements at a time."""
    got = run(spec, inputs, backend)
    first = next(iter(got.outputs.values()))
    upstream = upstream_like(first)
    totals: dict[str, list] = {}
    for start in range(0, inputs["actions"].shape[0], size):
        at = slice(start, start + size)
        part = pick(inputs, at)
        given = upstream[at] if upstream.dim() else upstream
        truth = run(spec, doubled(part), "reference", given)
        baseline = run(spec, part, "reference", given)
        per_token = {k: x[at] for k, x in got.outputs.items() if x.dim()}
        check_outputs(
            spec, part, per_token, {k: truth.outputs[k] for k in per_token}, baseline.outputs, dtype
        )
        check_gradients(
            {k: x[at] for k, x in got.grads.items()}, truth.grads, baseline.grads, dtype
        )
        for name, x in got.outputs.items():
            if not x.dim():
                totals.setdefault(name, []).append((truth.outputs[name], baseline.outputs[name]))
    for name, parts in totals.items():
        want, plain = (sum(x.double() for x in column) for column in zip(*parts, strict=True))
        off = (got.outputs[name].double() - want).abs()
        assert off <= 2 * (plain - want).abs() + 2.0**-18 * want.abs(), f"{name}: off by {off}"


# [sequences, tokens], V: rings of 1, 4 and 8 blocks a row, a warp a row, a block a row; the first
# has more than 16 rows a block, so that a ring's slots are used again, also with three blocks an SM
MANY = [
    ((90, 80), 8200, BF16),
    ((40, 100), 40000, BF16),
    ((20, 30), 262144, BF16),
    ((20, 16), 262144, F32),
    ((700, 101), 300, BF16),
    ((50, 80), 3000, F32),
    ((50, 80), 5000, BF16),
    ((50, 80), 5000, F32),
]


@each_backend
@pytest.mark.parametrize("percent", [None, 0, 1, 13, 100])
@pytest.mark.parametrize(("leading", "vocabulary", "dtype"), MANY)
def test_more_rows_than_fit_at_once(backend, leading, vocabulary, dtype, percent):
    """6-case 52: rings and persistent loops go round, and 70 700 rows are more than a grid's second
    dimension. None: no mask, so that no list of rows is walked."""
    for op in ("token_logprobs", "token_stats", "klq_loss", "klq_targets"):
        spec = SPECS[op]
        inputs = spec.inputs(DEVICE, dtype, leading=leading, vocabulary=vocabulary)
        inputs["mask"] = mask = (
            None if percent is None else torch.rand(leading, device=DEVICE) < percent / 100
        )
        if op == "klq_loss":
            away_from_q(inputs, spec.scalars)
        if mask is not None:
            inputs["logits"].masked_fill_(~mask.unsqueeze(-1), torch.nan)
        check_slices(spec, inputs, backend, dtype, max(1, leading[0] // 8))


@each_backend
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("op", ["token_logprobs", "token_stats", "klq_loss", "klq_targets"])
def test_a_slice_has_the_bits_of_the_whole(backend, op, masked):
    """6-cases 21, 66: a row's place in a ring that wraps shows in no bit."""
    spec = SPECS[op]
    inputs = spec.inputs(DEVICE, BF16, leading=(80, 100), vocabulary=9000)
    if not masked:
        inputs["mask"] = None
    whole = run(spec, inputs, backend)
    scanned = ("q", "advantages", "returns")
    for at in (slice(0, 1), slice(17, 19), slice(79, 80)):
        part = run(spec, pick(inputs, at), backend)
        for name, x in part.outputs.items():
            if x.dim() and name not in scanned:
                assert same_bits(x, whole.outputs[name][at]), name
        if op == "klq_loss":
            assert same_bits(part.grads["logits"], whole.grads["logits"][at])
