# SPDX-License-Identifier: Apache-2.0
"""The registry's ops on this CPU: `make bench`, `klq bench --device cpu`.

Runs `test_kernels.py` under pytest-benchmark in a process of its own and keeps what it found as
`<date>-cpu.json` (every sample), `.md` (the table, printed last) and a figure. Exit code 1 if a
result is wrong. pytest-benchmark's own options need no command of ours:
`pytest benchmarks --benchmark-enable --import-mode=importlib --benchmark-compare`.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import klq_kernels as klq
from benchmarks import figures, jobs, measure, runs, sweeps
from klq_kernels._registry import SPECS

HERE = Path(__file__).parent


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict:
    return {
        "date": runs.now(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": klq.build_info(),
        "commit": runs.commit(),
    }


def row(found: dict) -> dict:
    """One of pytest-benchmark's as one of ours."""
    about, samples = found["extra_info"], found["stats"]["data"]
    own = ("op", "shape", "side", "bytes", "flops", "extra_bytes", "floor", "x_floor", "x_naive")
    own += "paged", "x_naive_paged"
    rates = ("GB/s", "TFLOP/s")
    return {
        **{k: about[k] for k in (*own, *rates) if about.get(k) is not None},
        "kind": about["device"],
        "status": "ok",
        "samples": [float(f"{x:.5g}") for x in samples],
        "n": len(samples),
        "min": min(samples),
        **{k: measure.quantile(samples, q) for k, q in (("median", 0.5), ("p80", 0.8))},
    }


def run(only: list[str], quick: bool) -> tuple[list[dict], dict, int]:
    """Rows, ceilings and pytest's exit code."""
    chosen = [(j, s) for j in jobs.jobs("cpu") for s in j.sides if not only or j.name in only]
    if quick:
        first = {(j.op, j.spec.kind): j for j, _ in reversed(chosen)}  # the first of each op
        chosen = [(j, s) for j, s in chosen if first[j.op, j.spec.kind] == j]
    names = [f"{HERE / 'test_kernels.py'}::test_op[{jobs.label(j, s)}]" for j, s in chosen]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        options = ["--benchmark-enable", "--benchmark-only", "--import-mode=importlib"]
        options += [f"--benchmark-json={path}", "--benchmark-columns=min,median,rounds"]
        options += ["--benchmark-name=short", "--tb=short", "-p", "no:xdist", "--timeout=300"]
        command = [sys.executable, "-m", "pytest", "-v", *options, *names]
        code = subprocess.run(command, cwd=HERE.parent, stdout=sys.stderr).returncode
        found = json.loads(path.read_text()) if path.exists() else {"benchmarks": []}
    ceilings = found.get("machine_info", {}).get("ceilings", {})
    return [row(x) for x in found["benchmarks"]], ceilings, code


def table(rows: list[dict]) -> str:
    """A line for each op and shape: the faster naive side beside the fused one."""
    heads = ("op", "shape", "naive ms", "klq ms", "×", "× paged", "rate", "× floor")
    heads += "extra MiB", "naive MiB", ""
    lines = [runs.line(heads), runs.line(["---"] * len(heads))]
    for fused in (r for r in rows if measure.is_ours(r["side"])):
        naive = runs.naive(fused, rows)
        rate = f"{fused['GB/s']:.3g} GB/s" if "GB/s" in fused else ""
        rate = f"{fused['TFLOP/s'] * 1e3:.3g} GFLOP/s" if "TFLOP/s" in fused else rate
        extra = [
            f"{r['extra_bytes'] / 2**20:.1f}" if r.get("extra_bytes") is not None else ""
            for r in (fused, naive)
        ]
        times = (f"{r['min'] * 1e3:.4g}" for r in (naive, fused))
        ratios = (f"{fused[k]:.1f}" for k in ("x_naive", "x_naive_paged"))
        x = fused["op"], fused["shape"], *times, *ratios, rate, f"{fused['x_floor']:.2f}"
        lines.append(runs.line((*x, *extra, runs.unstable(fused, naive))))
    return "\n".join(lines) + "\n"


def heading(found: dict) -> str:
    about, top = found["machine"], found["ceilings"]
    rates = ", ".join(
        f"{k} {v / 1e9:.1f} " + ("GFLOP/s" if k.startswith("matmul") else "GB/s")
        for k, v in top.items()
    )
    return (
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, {about['date']}, "
        f"commit {about['commit']}. Minima of the rounds, memory kept between calls; paged: given "
        f"back before each, as large blocks are by default. Naive is the faster "
        f"of the shortest eager PyTorch and our reference. Floors: least traffic over the copy "
        f"rate, work of a head over the rate of a product. Ceilings: {rates}.\n\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="klq bench --device cpu", description=__doc__)
    parser.add_argument("--only", help=f"comma-separated: {', '.join(SPECS)}", default="")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results"
    )
    parser.add_argument("--quick", action="store_true", help="the first shape of each op, float32")
    parser.add_argument("--repeat", type=int, default=1, help="runs; rows that differ are marked")
    parser.add_argument(
        "--sweep", action="store_true", help="also over N, V, D, T and active share"
    )
    args = parser.parse_args(argv)
    only = [x for x in args.only.split(",") if x]
    if unknown := set(only) - set(SPECS):
        parser.error(
            f"--only: unknown {', '.join(sorted(unknown))}; choose from {', '.join(SPECS)}"
        )
    if args.repeat < 1:
        parser.error("--repeat: at least 1")
    about, made, code = machine(), [], 0
    for _ in range(args.repeat):
        rows, ceilings, failed = run(only, args.quick)
        made.append({"machine": about, "ceilings": ceilings, "rows": rows})
        code = code or failed
    *earlier, found = made
    if earlier:
        spread = runs.spreads(made)
        for r in found["rows"]:
            r["spread"] = spread.get(runs.key(r))
        found["earlier"] = [run["rows"] for run in earlier]
    if args.sweep:
        found["sweeps"] = list(sweeps.run("cpu", found["ceilings"], only))
    text = heading(found) + table(found["rows"])
    path = runs.save(args.out, found, text)
    print("", text, path, *figures.draw(found, path.with_suffix("")), sep="\n")
    return 1 if code else 0


if __name__ == "__main__":
    raise SystemExit(main())
