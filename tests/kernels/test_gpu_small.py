# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel once, on shapes small enough for compute-sanitizer (`make sanitize`): each op
in each of its plans, held loosely to float64 on the CPU so that hardly anything else runs there.

The fill of fresh memory is off, which would hide from initcheck what a kernel forgets to write.
"""

import pytest
import torch
from gpu_calls import BF16, DEVICE, F16, F32, Call, as_in_production
from oracle import Run, doubled, flatten, largest, pick, run, upstream_like
from torch import Tensor

from klq_kernels._registry import SPECS

pytestmark = [pytest.mark.gpu, pytest.mark.small]
ROW_OPS = [s.name for s in SPECS.values() if s.kind in ("rows", "targets")]
PAIRS = [op for op in ROW_OPS if "ref_logits" in SPECS[op].takes]
SCANS = [s.name for s in SPECS.values() if s.kind == "scan"]
GAPS = (0, 5, 0, 0, 1, 7, 0)
LONG = (1, 0, 2500, 1024, 1400, 0)

ROWS = [
    # a warp a row, a block a row, a ring of one block
    *(Call(op, dtype, vocabulary=301) for op in ROW_OPS for dtype in (BF16, F16, F32)),
    *(Call(op, dtype, vocabulary=3500) for op in ROW_OPS for dtype in (BF16, F16, F32)),
    *(Call(op, dtype, vocabulary=9001) for op in ROW_OPS for dtype in (BF16, F16, F32)),
    *(Call(op, BF16, "capped_low", vocabulary=v) for op in ROW_OPS for v in (301, 3500, 9001)),
    *(Call(op, BF16, "unmasked", vocabulary=9001) for op in ROW_OPS),
    *(Call(op, F16, "strided", vocabulary=v) for op in ROW_OPS for v in (301, 9001)),
    # rings with a longer row in one block
    *(Call(op, BF16, leading=(1, 3), vocabulary=200003) for op in ROW_OPS),
    # rings of 2, 4 and 8 blocks, in and out of place; the gradient from a second read
    *(
        Call("klq_loss", dtype, inplace=inplace, leading=(1, 4), vocabulary=v)
        for dtype, v in ((F16, 100003), (BF16, 170000), (F32, 170001), (BF16, 860000))
        for inplace in (False, True)
    ),
    Call("klq_loss", F32, "capped_low", leading=(1, 4), vocabulary=170001),
    *(Call("klq_loss", F16, inplace=True, vocabulary=v) for v in (301, 3500)),
    # the slots of a ring are used again: more than 16 rows a block, also where three share an SM
    Call("klq_loss", BF16, leading=(50, 80), vocabulary=8200),
    Call("token_logprobs", BF16, leading=(90, 80), vocabulary=8200),
    Call("token_stats", BF16, "unmasked", leading=(90, 80), vocabulary=8200),
    Call("klq_targets", BF16, leading=(90, 80), vocabulary=8200),
    # more blocks than fit at once, a dozen rows each
    Call("token_logprobs", BF16, "unmasked", leading=(90, 80), vocabulary=8200),
    Call("token_logprobs", F32, "unmasked", leading=(90, 80), vocabulary=4100),
    # a last chunk of fewer than 16 bytes
    *(Call(op, BF16, vocabulary=8193) for op in ROW_OPS),
    *(Call(op, F32, "unmasked", vocabulary=4097) for op in ROW_OPS),
    # packed: rows past the last end are inactive
    *(
        Call("klq_targets", BF16, "packed", leading=(17,), vocabulary=v, lengths=GAPS)
        for v in (301, 9001)
    ),
]
SHAPES = [
    *({"leading": size} for size in ((5, 8), (3, 100), (3, 301), (3, 1000), (2, 5000))),
    {"leading": (17,), "lengths": GAPS},
    {"leading": (sum(LONG) + 3,), "lengths": LONG},
]
SCANNED = [
    *(Call(op, dtype, **size) for op in SCANS for dtype in (F32, BF16) for size in SHAPES),
    *(
        Call("lambda_returns", F32, case, **size)
        for case in ("trace", "lam_rows")
        for size in SHAPES
    ),
    *(Call("gae", F32, "unmasked_scan", **size) for size in SHAPES[:5]),
    *(Call("gae", F32, "unaligned", **size) for size in SHAPES),
]


@pytest.fixture(autouse=True)
def unfilled(poisoned_memory):
    as_in_production()


def close(made: dict, truth: dict) -> None:
    for name, want in truth.items():
        x = made[name].cpu()
        grain = 2 * torch.finfo(x.dtype).eps if x.dtype in (BF16, F16) else 0.0
        most = (1e-4 + grain) * max(1.0, largest(want))
        torch.testing.assert_close(x.double(), want, rtol=1e-4 + grain, atol=most, msg=name)


def held(call: Call, inputs: dict, every: int = 1) -> None:
    """`call` on the device against float64 on the CPU, on every so many leading elements."""
    spec = SPECS[call.op]
    there = {k: _moved(x) for k, x in inputs.items()}
    part = pick(inputs, slice(None, None, every)) if every > 1 else inputs
    tokens = every > 1 and call.op != "klq_loss"  # an upstream for each
    whole = upstream_like(torch.empty(call.leading)) if tokens else None
    truth = run(spec, doubled(part), "reference", None if whole is None else whole[::every])
    first = next(iter(truth.outputs.values()))
    upstream = torch.ones(()) if first.dim() == 0 else upstream_like(first).float()
    upstream = upstream if whole is None else whole
    if every == 1 and first.dim() == 0:
        upstream = upstream * 0.5  # so that the gradient is scaled
        truth = Run(truth.outputs, {k: x * 0.5 for k, x in truth.grads.items()})
    got = call(there, "cuda", upstream.to(DEVICE))
    if every > 1:
        got = Run(
            {k: x[::every] for k, x in got.outputs.items() if x.dim()},
            {k: x[::every] for k, x in got.grads.items()},
        )
        truth = Run({k: truth.outputs[k] for k in got.outputs}, truth.grads)
    close(got.outputs, truth.outputs)
    close(got.grads, truth.grads)


def _moved(x):
    """On the device, with the strides and the offset from an aligned address that `x` has."""
    if not isinstance(x, Tensor) or x.numel() == 0:
        return x.to(DEVICE) if isinstance(x, Tensor) else x
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("call", [*ROWS, *SCANNED], ids=str)
def test_every_kernel(call):
    rows = 1
    for size in call.leading:
        rows *= size
    long = SPECS[call.op].kind != "scan" and rows > 500
    held(call, call.inputs(device="cpu"), 10 if long else 1)


@pytest.mark.parametrize("op", PAIRS)
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, F16), (F16, BF16)], ids=str)
def test_rows_of_two_types(op, dtypes):
    """Element by element; `boltzmann_values` and `q_values` have such a kernel of their own."""
    call = Call(op, dtypes[0], vocabulary=700)
    inputs = call.inputs(device="cpu")
    held(call, {**inputs, "ref_logits": inputs["ref_logits"].to(dtypes[1])})


@pytest.mark.parametrize("vocabulary", [301, 3500, 9001, 200003])
@pytest.mark.parametrize("case", ["plain", "capped_low"])
def test_loss_without_a_gradient(vocabulary, case):
    call = Call("klq_loss", BF16, case, vocabulary=vocabulary)
    inputs = call.inputs(device="cpu")
    spec = SPECS["klq_loss"]
    truth = flatten(spec.function(**doubled(inputs), backend="reference"))
    with torch.no_grad():
        made = spec.function(**{k: _moved(x) for k, x in inputs.items()}, backend="cuda")
    close(flatten(made), truth)


@pytest.mark.parametrize("vocabulary", [301, 3500, 9001])
@pytest.mark.parametrize("packed", [False, True])
def test_targets_from_cached_log_probs(vocabulary, packed):
    size = {"leading": (17,), "lengths": GAPS} if packed else {}
    call = Call("klq_targets", BF16, "packed" if packed else "plain", vocabulary=vocabulary, **size)
    inputs = call.inputs(device="cpu")
    del inputs["ref_logits"]
    held(call, {**inputs, "ref_logprobs": -inputs["rewards"].abs() - 1})
