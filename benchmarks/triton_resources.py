# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time without a GPU.

    python benchmarks/triton_resources.py        # writes benchmarks/results/triton_resources.md

The launchers themselves say what to compile: they run on meta tensors of real sizes with the launch
recorded, so a kernel is compiled with the arguments, tiles and warps it has in use.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import klq_kernels  # noqa: F401 (registers the operators)
from klq_kernels import _triton_host as host
from klq_kernels._operators import kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
RESULTS = Path(__file__).parent / "results" / "triton_resources.md"


class Launch(NamedTuple):
    what: str
    kernel: Callable
    args: tuple
    options: dict


class Resources(NamedTuple):
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes a program
    vectors: bool  # 16-byte loads from memory


def recorded(what: str, function: Callable, *args) -> list[Launch]:
    """The launches of one call."""
    found, launch = [], host.launch

    def record(kernel, programs, like, *args, **options):
        found.append(Launch(what, kernel, args, {"enable_fp_fusion": False, **options}))

    host.launch = record
    try:
        function(*args)
    finally:
        host.launch = launch
    return found


def launches(dtype=torch.bfloat16, width=128256, rows=(8, 1024), scaling=(1.0, 0.0)):
    """Every kernel, on logits of `dtype` and of a real size."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, other = (empty(*rows, width, dtype=dtype) for _ in range(2))
    x, mask = empty(*rows), empty(*rows, dtype=torch.bool)
    ids = empty(*rows, dtype=torch.int64)
    seq, stats = empty(rows[0]), empty(3, *rows)
    flat, flat_mask, ends = empty(1 << 16), empty(1 << 16, dtype=torch.bool), empty(9).int()
    long, long_mask = empty(8, 131072), empty(8, 131072, dtype=torch.bool)
    loss = (logits, ids, x, x, x, 0.05, mask, x, None, *scaling)
    scan = (0.05, 1.0, 0.95, None, 1.0)
    half = empty(*rows) if dtype == torch.float16 else empty(0)
    calls = {
        "token_logprobs": (logits, ids, mask, *scaling),
        "token_logprobs_backward": (x, logits, ids, mask, stats, *scaling),
        "token_logprobs_backward_": (logits, x, ids, mask, stats, *scaling),
        "token_log_ratios": (logits, other, ids, mask, *scaling),
        "token_stats": (logits, ids, other, mask, *scaling),
        "q_values": (logits, other, x, 0.05, *scaling),
        "boltzmann_values": (empty(*rows, width), other, 0.05, *scaling),
        "klq_loss": (*loss, True),
        "klq_loss_": loss,
        "klq_loss_backward_": (logits, half, empty()),
        "klq_targets": (logits, ids, x, x, other, None, *scan, mask, None, seq, *scaling),
        "lambda_returns": (x, x, x, *scan, mask, None, seq, None),
        "lambda_returns, long": (long, long, long, *scan, long_mask, None, empty(8), None),
        "lambda_returns, packed": (flat, flat, flat, *scan, flat_mask, ends, empty(8), flat),
        "gae": (x, x, 1.0, 0.95, mask, None, seq),
        "place_scores": (seq, mask, None),
    }
    for what, args in calls.items():
        yield from recorded(what, kernel(what.split(",")[0]), *args)


def unique(found) -> list[Launch]:
    """Launches that differ in what is compiled."""
    kept = {}
    for x in found:
        signature, constants, attrs = specialised(x)
        key = (x.kernel, *signature.items(), *constants.items(), *map(str, attrs))
        kept.setdefault((*key, *sorted(x.options.items())), x)
    return list(kept.values())


def specialised(x: Launch) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as Triton's own launch would choose them."""
    signature, constants, attrs = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(x.kernel.params, x.args, strict=True)):
        name = parameter.name
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + POINTERS[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and free:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attrs


POINTERS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def compile(x: Launch, target: GPUTarget) -> Resources:
    signature, constants, attrs = specialised(x)
    source = ASTSource(x.kernel, signature, constants, attrs)
    options = dict(x.options)
    if target.backend == "hip":
        options["num_warps"] = host.hip_warps(options["num_warps"])
    made = triton.compile(source, target=target, options=options)
    shared = made.metadata.shared
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Resources(registers, spills, shared, "load_dwordx4" in text or "x4" in text)
    text = made.asm["ptx"]
    registers, spills = ptxas(text)
    vectors = re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.c\S+ .* 0x10", text) is not None
    return Resources(registers, spills, shared, vectors)


def ptxas(ptx: str) -> tuple[int, int]:
    """(registers a thread, spilled bytes), from the assembler that comes with Triton."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = next(t for t in (folder / "ptxas-blackwell", folder / "ptxas") if t.exists())
    arch = re.search(r"\.target (\w+)", ptx).group(1)
    done = subprocess.run(
        [str(tool), "-v", f"-arch={arch}", "-o", "/dev/null", "/dev/stdin"],
        input=ptx,
        capture_output=True,
        text=True,
        check=True,
    )
    registers = int(re.search(r"Used (\d+) registers", done.stderr).group(1))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def table(found: list[Launch], targets=TARGETS) -> tuple[str, list[str]]:
    """A Markdown table, and the lines that spill."""
    head = ["kernel", "called as", "warps", *targets]
    lines = [head, ["---"] * len(head)]
    bad = []
    for x in found:
        cells = []
        for name, target in targets.items():
            r = compile(x, target)
            cells.append(
                f"{r.registers} / {r.shared}" + (f" / {r.spills} SPILLED" * (r.spills > 0))
            )
            if r.spills:
                bad.append(f"{x.kernel.__name__} ({x.what}) on {name}: {r.spills}")
        lines.append([f"`{x.kernel.__name__}`", x.what, str(x.options["num_warps"]), *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines), bad


def main() -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        name = str(dtype).removeprefix("torch.")
        found += [x._replace(what=f"{x.what}, {name}") for x in launches(dtype)]
    text, bad = table(unique(found))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        "<!-- python benchmarks/triton_resources.py -->\n"
        "# Triton kernels compiled ahead of time\n\n"
        f"Triton {triton.__version__}, logits 8 × 1024 × 128256: registers a thread / bytes of "
        "shared memory a program; no kernel spills.\n\n" + text + "\n"
    )
    print(text)
    sys.exit("\n".join(bad) or 0)


if __name__ == "__main__":
    main()
