# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and shared memory of every CUDA kernel, compiled without a GPU.

    python benchmarks/cuda_resources.py     # writes benchmarks/results/cuda_resources.md

A family is a kernel with its row op and shape: element types, soft-caps, and widths of a row's
group are folded, so that numbers are the largest over them. Needs nvcc and binutils' c++filt.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda_resources.md"
ARCHS = ("sm_80", "sm_90a", "sm_100")
FLAGS = ("-cubin", "-O3", "-std=c++20", "-Icsrc", "-Xptxas", "-v")  # as setup.py, this pass alone

ENTRY = re.compile(r"Compiling entry function '(.+)' for '\w+'")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")
FOLDED = re.compile(r"^(float|true|false|\d+|bf16|f16|Elements|Vectors<.*)$")
TILING = re.compile(r"Tiling<(\d+), (\d+), (\d+), (\d+), (true|false), (true|false)>")
RING = re.compile(r"RingShape<(\d+), (\d+), (\d+), (\d+), (\d+)>")
ENUMERATOR = re.compile(r"\((\w+)\)(\d+)")


class Family(NamedTuple):
    source: str
    kernel: str
    shape: str  # the op of a row kernel, and the ring it runs in
    dynamic: int  # bytes of shared memory the launcher adds


class Use(NamedTuple):
    """The largest over a family's kernels."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    kernels: int = 0

    def and_(self, registers: int, spills: int, shared: int) -> "Use":
        return Use(
            max(self.registers, registers),
            self.spills + spills,
            max(self.shared, shared),
            self.kernels + 1,
        )


def arguments(template: str) -> list[str]:
    """The top-level arguments of `a, b<c, d>, e`."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(template):
        depth += (letter == "<") - (letter == ">")
        if letter == "," and depth == 0:
            found.append(template[start:i].strip())
            start = i + 1
    return [*found, template[start:].strip()]


@cache
def enumerators(enum: str) -> list[str]:
    """The names of an enum class of csrc/cuda."""
    text = "".join(p.read_text() for p in sorted((ROOT / "csrc" / "cuda").iterdir()))
    return re.findall(r"\w+", re.search(rf"enum class {enum}\b[^{{]*{{([^}}=]+)}}", text).group(1))


def named(value: re.Match) -> str:
    """`(Wanted)2` by its name."""
    enum, number = value.groups()
    return enumerators(enum)[int(number)]


def family(source: str, demangled: str) -> Family:
    """Of `void klq::cuda::kernel<...>(...)`."""
    plain = re.sub(r"klq::cuda::|\(anonymous namespace\)::", "", demangled).removeprefix("void ")
    name = re.match(r"\w+", plain).group()
    inside, depth = "", 0
    for letter in plain[len(name) :]:
        depth += (letter == "<") - (letter == ">")
        if depth == 0:
            break
        inside += letter
    kept, dynamic = [], 0
    for argument in arguments(inside[1:]):
        if ring := RING.fullmatch(argument):
            summers, writers, unroll, stages, blocks = map(int, ring.groups())
            dynamic = stages * (summers * unroll + 8) * 16  # RingShape::kBytes
            kept.append(f"{summers + writers + 64} threads, {stages} stages, {blocks} an SM")
        elif tiling := TILING.fullmatch(argument):
            blocks, columns, stages, cluster = map(int, tiling.groups()[:4])
            rows = 64 * blocks
            dynamic = stages * (rows + columns) * 128 + 8 * 2048 + 1024  # Tiling::kBytes
            kept.append(f"{rows} x {columns}, {stages} stages, clusters of {cluster}")
            across = [x for x, is_ in zip("AB", tiling.groups()[4:], strict=True) if is_ == "true"]
            kept += [" and ".join(across) + " across"] * bool(across)
        elif argument.startswith(("RingShape<", "Tiling<")):
            raise ValueError(f"{argument} has parameters that nobody here knows")
        elif argument and not FOLDED.match(argument):
            kept.append(f"`{ENUMERATOR.sub(named, argument)}`")
    return Family(source, name, ", ".join(kept), dynamic)


def compiled(job: tuple[Path, str]) -> list[tuple[str, str, Family, tuple[int, int, int]]]:
    """(arch, full name, family, (registers, spilled bytes, static shared bytes)) of a file."""
    source, arch = job
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["nvcc", *FLAGS, f"-arch={arch}", "-o", f"{folder}/out.cubin", str(source)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{source} for {arch}:\n{done.stderr[-3000:]}")
    text = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True).stdout
    found = []
    for block in re.split(r"(?=ptxas info\s+: Compiling entry function)", text):
        if entry := ENTRY.search(block):
            shared = SHARED.search(block)
            use = (
                int(USED.search(block).group(1)),
                sum(map(int, SPILLS.findall(block))),
                int(shared.group(1)) if shared else 0,
            )
            made = family(source.name.removesuffix("_kernel.cu"), entry.group(1))
            found.append((arch, entry.group(1), made, use))
    return found


def main() -> None:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*_kernel.cu"))
    uses: dict[Family, dict[str, Use]] = {}
    bad = []
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(compiled, [(s, arch) for s in sources for arch in ARCHS]):
            for arch, name, made, use in found:
                one = uses.setdefault(made, {})
                one[arch] = one.get(arch, Use()).and_(*use)
                if use[1]:
                    bad.append(f"{use[1]} bytes spilled on {arch}: {name}")
    head = ["source", "kernel", "op, shape", "kernels", *ARCHS, "dynamic shared"]
    lines = [head, ["---"] * len(head)]
    for made, one in sorted(uses.items()):
        cells = []
        for arch in ARCHS:
            use = one[arch]
            cell = f"{use.registers} / {use.shared}"
            cells.append(cell + f" / {use.spills} SPILLED" * (use.spills > 0))
        count = str(max(use.kernels for use in one.values()))
        kernel = [made.source, f"`{made.kernel}`", made.shape, count]
        lines.append([*kernel, *cells, str(made.dynamic or "")])
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", version).group(1)
    verdict = f"{len(bad)} kernels spill" if bad else "no kernel spills"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        "<!-- python benchmarks/cuda_resources.py -->\n"
        "# CUDA kernels compiled ahead of time\n\n"
        f"nvcc {release}, {verdict}. Registers a thread / bytes of static shared memory a block, "
        "the largest over the kernels of a family (element types, soft-caps, widths of a group); "
        "dynamic shared memory in bytes a block. The ring is an empty kernel below sm_90, "
        "the products of the LM head are everywhere but on sm_90a.\n\n" + text + "\n"
    )
    print(text)
    sys.exit("\n".join(bad) or 0)


if __name__ == "__main__":
    main()
