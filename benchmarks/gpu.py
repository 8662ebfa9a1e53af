# SPDX-License-Identifier: Apache-2.0
"""Our kernels and everyone else's on one GPU, in one process: `klq bench`.

Ceilings first (copy, read and product), then every workload: a gate against float64, then all sides
in turn, in a new order every round, cold, with CUDA events. Leaves `<date>-<gpu>.json` (every
sample), `.md` (the table, also printed last) and figures. benchmarks/README.md has the protocol.
Exit code 1 if one of our results is wrong.
"""

import argparse
import gc
import os
import time
from pathlib import Path

import torch

import klq_kernels as klq
from benchmarks import figures, measure, peers, runs, sweeps
from benchmarks.clocks import Clocks
from benchmarks.runs import output_of
from benchmarks.workloads import WORKLOADS

ROUNDS = 25


def card() -> dict[str, str]:
    """The driver and what the card is doing, empty without nvidia-smi."""
    asked = "driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"
    query = f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "-i", "0"
    said = output_of("nvidia-smi", *query)
    return dict(zip(asked, said.split(", "), strict=True)) if said else {}


def machine(seed: int) -> dict:
    import triton

    p = torch.cuda.get_device_properties(0)
    return {
        "date": runs.now(),
        "gpu": p.name,
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "build": klq.build_info(),
        "commit": runs.commit(),
        "seed": seed,
        "peers": peers.versions(),
    }


def ceilings(timer, rounds: int) -> dict:
    """Bytes a second: a copy of 2 GiB (read and write counted), and the better of two reductions
    that read as much. Operations a second: a bfloat16 product of 8192 x 8192 matrices."""
    source = torch.empty(512 << 20, device="cuda").normal_()
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    a, b, c = torch.empty(3, 8192, 8192, dtype=torch.bfloat16, device="cuda").normal_()
    work = {
        "copy": (lambda: target.copy_(source), 2 * size),
        "sum": (lambda: source.sum(), size),
        "amax": (lambda: source.amax(), size),
        "matmul": (lambda: torch.mm(a, b, out=c), 2 * 8192**3),
    }
    for run, _ in work.values():
        run()
    samples = {name: [] for name in work}
    for _ in range(rounds):
        for name, (run, _) in work.items():
            samples[name].append(timer.sample("queued", run))
    rate = {name: work[name][1] / measure.quantile(x, 0.5) for name, x in samples.items()}
    read = max(rate["sum"], rate["amax"])
    return {"copy": rate["copy"], "read": read, "matmul": rate["matmul"], "card": card()}


def run(only: list[str], quick: bool, timer, save) -> list[measure.Row]:
    """All rows; `save(ceilings, rows)` after every group, so that a run cut short leaves them."""
    rounds = 5 if quick else ROUNDS
    top = {"first": ceilings(timer, rounds)}
    rates = "copy {copy:.3e} B/s, read {read:.3e} B/s, matmul {matmul:.3e} FLOP/s, {card}"
    print(rates.format(**top["first"]), flush=True)
    rows = []
    for work in WORKLOADS:
        if only and work.name not in only:
            continue
        for shape in work.shapes[:1] if quick else work.shapes:
            begun = time.perf_counter()
            group = work.build(*shape, compiles=not quick)
            done = measure.measure(group, timer, rounds, top["first"]["copy"])
            spent = time.perf_counter() - begun
            print(f"{group.op} {group.shape}: {spent:.1f} s", flush=True)
            for r in done:
                figure = f"{r.median * 1e6:.1f} us" if r.samples else f"{r.status}: {r.reason}"
                print(f"    {r.side} ({r.kind}): {figure}", flush=True)
            rows += done
            save(top, rows)
            del group
            gc.collect()
            torch.cuda.empty_cache()
    top["last"] = ceilings(timer, rounds)
    print(rates.format(**top["last"]), flush=True)
    save(top, rows)
    return rows


def heading(about: dict, top: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about["peers"].items() if v != "not installed")
    first, last = top["first"], top.get("last")
    end = f"{last['copy'] / 1e12:.2f}" if last else "stopped before it was measured again"
    product = (
        f", bfloat16 product {first['matmul'] / 1e12:.0f} TFLOP/s" if "matmul" in first else ""
    )
    return (
        f"{about['gpu']}, driver {first['card'].get('driver_version')}, torch {about['torch']}, "
        f"Triton {about['triton']}, {about['date']}, commit {about['commit']}. bfloat16 unless "
        f"said, cold L2, medians. Floors: bytes over the copy rate of this run, "
        f"{first['copy'] / 1e12:.2f} TB/s (at its end: {end}; read alone "
        f"{first['read'] / 1e12:.2f}){product}; of the linear ops, the matrix products. "
        f"Peers: {versions}.\n\n"
    )


def main(argv: list[str] | None = None) -> int:
    names = list(dict.fromkeys(w.name for w in WORKLOADS))
    parser = argparse.ArgumentParser(prog="klq bench", description=__doc__)
    parser.add_argument("--only", help=f"comma-separated: {', '.join(names)}", default="")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results"
    )
    parser.add_argument("--quick", action="store_true", help="first shapes, few rounds, no compile")
    parser.add_argument("--repeat", type=int, default=1, help="runs; rows that differ are marked")
    parser.add_argument(
        "--sweep", action="store_true", help="also over N, V, D, T and active share"
    )
    args = parser.parse_args(argv)
    only = [x for x in args.only.split(",") if x]
    if unknown := set(only) - set(names):
        parser.error(
            f"--only: unknown {', '.join(sorted(unknown))}; choose from {', '.join(names)}"
        )
    if args.repeat < 1:
        parser.error("--repeat: at least 1")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if klq.build_info().get("racecheck"):
        parser.error(
            "this build is for racecheck (make sanitize); build again without KLQ_RACECHECK"
        )
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    about, made = machine(seed), []

    def save(top: dict, rows: list[measure.Row]) -> None:
        found, left = {"machine": about, "ceilings": top, "clocks": clocks.samples()}, []
        if made:
            spread = runs.spreads([*made, {**found, "rows": [r.as_dict() for r in rows]}])
            for r in rows:
                r.spread = spread.get(runs.key(vars(r)))
            # a run cut short leaves what it has not reached as the run before has it
            reached = {runs.key(vars(r)) for r in rows}
            left = [r for r in save.rows if runs.key(vars(r)) not in reached]
            rows = rows + left
            found["earlier"] = [run["rows"] for run in made]
        found["rows"] = [r.as_dict() for r in rows]
        note = f"From {left[0].op} {left[0].shape} on: of the run before.\n\n" if left else ""
        save.path = runs.save(args.out, found, heading(about, top) + note + measure.table(rows))
        save.found = found

    with Clocks() as clocks:
        bad = []
        for _ in range(args.repeat):
            save.rows = rows = run(only, args.quick, measure.CudaTimer(), save)
            made.append(save.found)
            bad += [r for r in rows if r.status in ("wrong", "failed") and measure.is_ours(r.side)]
        top = save.found["ceilings"]
        if args.sweep:
            ceilings_of = {**top["first"], "matmul bfloat16": top["first"]["matmul"]}
            save.found["sweeps"] = []
            for sweep in sweeps.run("cuda", ceilings_of, only):
                save.found["sweeps"].append(sweep)
                runs.save(args.out, save.found, heading(about, top) + measure.table(rows))
    drawn = figures.draw(save.found, save.path.with_suffix(""))
    print("", save.path.with_suffix(".md").read_text(), save.path, *drawn, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
