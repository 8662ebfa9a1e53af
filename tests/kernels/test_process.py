# SPDX-License-Identifier: Apache-2.0
"""What needs a process of its own: memory peaks, huge strides, other instruction sets, determinism
across processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def python(code: str, **env: str) -> str:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


MEMORY = """
import gc, resource, torch
from klq_kernels._registry import SPECS, tensors_of

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def call(spec, inputs, backend="cpp"):
    args = dict(inputs)
    leaves = [args[n].detach().requires_grad_() for n in spec.grads]
    args.update(zip(spec.grads, leaves))
    out = tensors_of(spec.function(**args, backend=backend))
    grads = torch.autograd.grad(out[0], leaves, torch.ones_like(out[0])) if leaves else ()
    return [*out, *grads]

def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)

def measure(spec, dtype, inplace=False, backend="cpp"):
    inputs = spec.inputs(dtype=dtype, leading=(2, 64), vocabulary=50304)
    call(spec, spec.inputs(dtype=dtype, leading=(2, 3), vocabulary=4099), backend)
    if inplace:
        inputs["logits"] = inputs["logits"].requires_grad_() * 1.0
    gc.collect()
    # fill memory up to the high-water mark, so that the mark moves with the call
    keep = torch.ones(max(0, peak() - now()) // 4 + 2**18)
    before = peak()
    if inplace:
        out = spec.function(**inputs, inplace=True, backend=backend)
        torch.autograd.grad(out.loss, inputs["logits"])
        made = tensors_of(out)
    else:
        made = call(spec, inputs, backend)
    return peak() - before - size(made)

for spec in SPECS.values():
    if spec.kind in ("rows", "targets"):
        for dtype in (torch.float32, torch.bfloat16):
            print(spec.name, dtype, measure(spec, dtype))
            if spec.name == "klq_loss":
                print(spec.name, dtype, measure(spec, dtype, inplace=True))
plain = measure(SPECS["token_logprobs"], torch.float32, backend="reference")
print("reference", torch.float32, plain)
"""


def test_peak_memory_of_the_row_ops():
    """No [N, V] temporary anywhere on the CPU: beyond inputs, results and gradients at most 1 MiB
    (a float32 copy of these logits is 25 MiB)."""
    # without the allocator's cache of freed blocks, which would hide a temporary
    lines = python(MEMORY, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    seen = [line.split() for line in lines.split("\n") if line]
    *kernels, reference = [(name, dtype, int(beyond)) for name, dtype, beyond in seen]
    assert len(kernels) == 16
    assert not [row for row in kernels if row[2] > 2**20], kernels
    assert reference[2] > 40 * 2**20, f"the measurement does not see temporaries: {reference}"


FAR = """
import torch
from klq_kernels import klq_loss, token_logprobs, token_log_ratios, token_stats, lambda_returns

pitch, width = 2**30 + 7, 1000
def far(dtype, seed):
    x = torch.empty(2 * pitch + width, dtype=dtype).as_strided((3, width), (pitch, 1))
    x.copy_(torch.randn(3, width, generator=torch.Generator().manual_seed(seed)))
    return x

z, b = far(torch.bfloat16, 0), far(torch.bfloat16, 1)
near_z, near_b = z.contiguous(), b.contiguous()
a = torch.tensor([0, 999, 500])
for backend in ("cpp", "reference"):
    how = {"backend": backend}
    assert torch.equal(token_logprobs(z, a, **how), token_logprobs(near_z, a, **how))
    got, want = token_log_ratios(z, b, a, **how), token_log_ratios(near_z, near_b, a, **how)
    assert torch.equal(got, want)
    for x, y in zip(token_stats(z, a, ref_logits=b, **how),
                    token_stats(near_z, a, ref_logits=near_b, **how)):
        assert torch.equal(x, y)
v = torch.randn(3)
rest = {"ref_logprobs": v - 3, "returns": v + 1, "tau": 0.3}
leaf = near_z.clone().requires_grad_()
(want,) = torch.autograd.grad(klq_loss(leaf, a, v, **rest).loss, leaf)
with torch.no_grad():
    klq_loss(z, a, v, **rest, inplace=True)  # writes at offsets past 2^31
assert torch.equal(z, want), (z - want).abs().max()
rho = torch.empty(2 * pitch + 5).as_strided((3, 5), (pitch, 1)).copy_(torch.randn(3, 5))
near = lambda_returns(rho.contiguous(), v[:, None].expand(3, 5), torch.ones(3, 5), tau=0.3)
out = lambda_returns(rho, v[:, None].expand(3, 5), torch.ones(3, 5), tau=0.3)
assert torch.equal(out.returns, near.returns)
"""


def test_case_22_and_51_offsets_past_31_bits():
    """Rows 2^30 elements apart, read and overwritten; only the touched pages exist."""
    python(FAR)


OTHER_ISA = """
import torch
from klq_kernels import build_info
from klq_kernels._registry import SPECS
from oracle import case, check

torch.use_deterministic_algorithms(True)
names = "plain extreme flat peaked banned capped cold vocabulary_4099 strided".split()
done = 0
for spec in SPECS.values():
    for name in names:
        if case(name) in spec.cases:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                check(spec, spec.inputs("cpu", dtype, case(name)), "cpp", dtype)
                done += 1
print(build_info()["cpu_isa"], done)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_is_within_bounds(isa):
    """What the machine has beyond these is what every other test runs on."""
    name, done = python(OTHER_ISA, KLQ_CPU_ISA=isa).split()
    assert name in ("baseline", isa) and int(done) > 100


BITS = """
import hashlib, torch
from klq_kernels._registry import SPECS
from oracle import run
torch.use_deterministic_algorithms(True)
for spec in SPECS.values():
    made = run(spec, spec.inputs(dtype=torch.bfloat16), "cpp")
    for name, x in {**made.outputs, **made.grads}.items():
        data = x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)
        print(spec.name, name, hashlib.sha256(bytes(data.flatten().tolist())).hexdigest())
"""


def test_processes_agree_bit_for_bit():
    """Case 66: a second process, with other addresses, gives the same bits."""
    assert python(BITS) == python(BITS, PYTHONHASHSEED="7")
