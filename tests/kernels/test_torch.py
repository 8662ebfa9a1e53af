# SPDX-License-Identifier: Apache-2.0
"""The ops under opcheck, fakes, torch.compile and autocast; generic over the registry."""

import pytest
import torch
from oracle import CUDA_ONLY, backends, flatten, grid, present, run, same_bits, upstream_like
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from klq_kernels._registry import SPECS


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every torch.ops.klq and torch.ops.klq_triton call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("klq", "klq_triton"):
            # as they are: a clone would lose the layout under test
            kept = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            self.calls.append((func, tuple(kept)))
        return func(*args, **(kwargs or {}))


def recorded(spec, inputs, **more) -> list:
    with Recorder() as recorder:
        args = {**inputs, **more}
        leaves = [args[n].detach().requires_grad_() for n in spec.grads if n in args]
        args.update(zip([n for n in spec.grads if n in args], leaves, strict=True))
        if more.get("inplace"):
            args["logits"] = args["logits"] * 1.0
        made = spec.function(**args)
        if leaves:
            out = made if isinstance(made, torch.Tensor) else made[0]
            torch.autograd.grad(out, leaves, upstream_like(out) * 2)
    return recorder.calls


def in_place(calls) -> list:
    """The backwards of log-probs among `calls` as the LM-head ops call them, over the logits."""
    over = torch.ops.klq.token_logprobs_backward_.default
    return [
        (over, (logits.clone(), grad, *rest))
        for func, (grad, logits, *rest) in calls
        if func is torch.ops.klq.token_logprobs_backward.default
    ]


def layouts(spec, device):
    size = {"leading": (3, 4), "vocabulary": 11, "width": 5}
    for name in ("plain", "strided", "packed", "lam_rows", "trace", "all_masked"):
        for case in spec.cases:
            if case.name == name:
                yield spec.inputs(device, torch.float32, case, **(size if not case.size else {}))


WITH_KERNELS = [
    pytest.param(spec, device, id=f"{spec.name}-{device}")
    for device in present()
    for spec in SPECS.values()
    if len(backends(spec.name, device)) > 1
]


@pytest.mark.parametrize(("spec", "device"), WITH_KERNELS)
def test_opcheck(spec, device):
    """6-case 68: schema, fake, autograd registration and tracing of every operator, on compact and
    permuted layouts, forward and backward."""
    for inputs in layouts(spec, device):
        calls = recorded(spec, inputs)
        if spec.name == "klq_loss":
            calls += recorded(spec, inputs, inplace=True)
            calls += recorded(spec, {k: half(v) for k, v in inputs.items()})
        calls += in_place(calls)
        assert calls, "no operator was called"
        for func, args in calls:
            torch.library.opcheck(func, args)


def half(x):
    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.to(torch.float16) if floating else x


def test_every_operator_is_reached_by_opcheck():
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n[:5] == "klq::"}
    seen = set()
    for spec in SPECS.values():
        calls = recorded(spec, spec.inputs())
        if spec.name == "klq_loss":
            calls += recorded(spec, spec.inputs(), inplace=True)
        calls += in_place(calls)
        seen |= {func.__name__.split(".")[0] for func, _ in calls}
    assert seen == names - CUDA_ONLY


@grid(
    cases="plain strided packed no_rows lam_rows trace compacted",
    dtypes=(torch.float32, torch.bfloat16),
)
def test_fakes_know_dtype_shape_and_layout(spec, case, device, backend, dtype):
    inputs = spec.inputs(device, dtype, case)
    real = flatten(spec.function(**inputs, backend=backend))
    with FakeTensorMode() as mode:
        fake_in = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
        }
        fake = flatten(spec.function(**fake_in, backend=backend))
    assert list(fake) == list(real)
    for name, x in real.items():
        y = fake[name]
        assert (y.dtype, y.shape, y.stride(), y.device) == (x.dtype, x.shape, x.stride(), x.device)


def trained(spec, backend, **more):
    """The op as a compiled training step sees it: a later op, a loss that is not last."""

    def step(inputs):
        args = {**inputs, **more}
        if more.get("inplace"):
            args["logits"] = args["logits"] * 1.0
        made = spec.function(**args, backend=backend)
        first = made if isinstance(made, torch.Tensor) else made[0]
        return (first * 0.5).sum(), tuple(flatten(made).values())

    return step


def compare_compiled(spec, device, engine, sizes, backend, **more):
    torch._dynamo.reset()
    step = trained(spec, backend, **more)
    compiled = torch.compile(step, fullgraph=True, backend=engine)
    for leading in sizes:
        inputs = spec.inputs(device, torch.float32, leading=leading, vocabulary=33, width=8)
        results = []
        for function in (step, compiled):
            args = dict(inputs)
            leaves = [args[n].detach().clone().requires_grad_() for n in spec.grads]
            args.update(zip(spec.grads, leaves, strict=True))
            total, outputs = function(args)
            grads = torch.autograd.grad(total, leaves) if leaves else ()
            results.append((*outputs, *grads))
        for eager, made in zip(*results, strict=True):
            if backend == "reference" or engine == "inductor":
                torch.testing.assert_close(made, eager, rtol=1e-5, atol=1e-5)
            else:
                assert same_bits(made.detach(), eager.detach())


@pytest.mark.parametrize(("spec", "device"), WITH_KERNELS)
def test_compile_fullgraph(spec, device):
    """6-cases 33, 68: one graph, forward and backward, bit for bit eager; then other sizes, which
    make the graph dynamic."""
    compare_compiled(spec, device, "aot_eager", [(3, 5), (4, 7), (2, 9)], None)


def test_compile_inplace():
    spec = SPECS["klq_loss"]
    compare_compiled(spec, "cpu", "aot_eager", [(3, 5), (4, 7)], None, inplace=True)


@pytest.mark.parametrize(
    ("name", "more"), [("klq_loss", {}), ("klq_loss", {"inplace": True}), ("linear_klq_loss", {})]
)
def test_compiled_second_backward_repeats_or_raises(name, more):
    """Rule 12: a gradient handed over is never silently scaled twice, compiled or not."""
    torch._dynamo.reset()
    spec = SPECS[name]
    compiled = torch.compile(trained(spec, None, **more), fullgraph=True, backend="aot_eager")
    inputs = spec.inputs()
    leaves = {n: inputs[n].clone().requires_grad_() for n in spec.grads}
    total, _ = compiled({**inputs, **leaves})
    first = [
        g.clone() for g in torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    ]
    try:
        second = torch.autograd.grad(total, list(leaves.values()))
    except RuntimeError:
        return
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["klq_loss", "lambda_returns"])
def test_compile_inductor(name):
    compare_compiled(SPECS[name], "cpu", "inductor", [(3, 5)], None)


def test_compile_softcap_and_scalars():
    """6-case 68: Python floats stay float64 scalars of the op and give eager's bits."""
    spec = SPECS["token_logprobs"]
    scalars = {"temperature": 0.7, "logit_softcap": 5.0}
    compare_compiled(spec, "cpu", "aot_eager", [(3, 5)], None, **scalars)


@grid(cases="plain", dtypes=(torch.float32,), only=lambda s: s.kind != "linear")
def test_autocast_changes_nothing(spec, case, device, backend, dtype):
    """Statistics are float32 whatever the region they run in."""
    inputs = spec.inputs(device, dtype, case)
    outside = run(spec, inputs, backend)
    with torch.autocast(device, torch.bfloat16):
        inside = run(spec, inputs, backend)
    for name, x in outside.outputs.items():
        assert same_bits(x, inside.outputs[name]), name
    for name, x in outside.grads.items():
        assert same_bits(x, inside.grads[name]), name


@grid(cases="plain", dtypes=(torch.float32,), only=lambda s: s.kind == "linear")
def test_autocast_casts_the_head_like_linear(spec, case, device, backend, dtype):
    """6-case 63: under autocast float32 hidden and weight meet in bfloat16, gradients come back in
    float32."""
    inputs = spec.inputs(device, dtype, case)
    with torch.autocast(device, torch.bfloat16):
        inside = run(spec, inputs, backend)
    head = ("hidden", "weight", "bias")
    narrow = {k: v.bfloat16() if k in head else v for k, v in inputs.items()}
    outside = run(spec, narrow, backend)
    for name, x in outside.outputs.items():
        assert same_bits(x, inside.outputs[name]), name
    for name, x in outside.grads.items():
        assert inside.grads[name].dtype == torch.float32
        assert same_bits(x.float(), inside.grads[name].float()), name
