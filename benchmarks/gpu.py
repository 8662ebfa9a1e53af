# SPDX-License-Identifier: Apache-2.0
"""Our kernels and everyone else's on one GPU, in one process: `python -m benchmarks.gpu`.

Ceilings first (copy and read rate), then every workload: a gate against float64, then all sides
round robin, cold, with CUDA events. Leaves gpu.json (every sample) and gpu.md (the table, also
printed last). benchmarks/README.md has the protocol. Exit code 1 if one of our results is wrong.
"""

import argparse
import datetime
import gc
import json
import os
import subprocess
import time
from pathlib import Path

import torch

import klq_kernels as klq
from benchmarks import measure, peers
from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def card() -> dict[str, str]:
    """The driver and what the card is doing, empty without nvidia-smi."""
    asked = "driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"
    query = f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "-i", "0"
    said = output_of("nvidia-smi", *query)
    return dict(zip(asked, said.split(", "), strict=True)) if said else {}


def machine(seed: int) -> dict:
    import triton

    here = ("git", "-C", str(Path(__file__).parent))
    dirty = "+changes" if output_of(*here, "status", "--porcelain", "-uno") else ""
    commit = output_of(*here, "rev-parse", "--short=12", "HEAD")
    p = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "gpu": p.name,
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "build": klq.build_info(),
        "commit": os.environ.get("KLQ_COMMIT") or (commit + dirty if commit else "unknown"),
        "seed": seed,
        "peers": peers.versions(),
    }


def ceilings(timer, rounds: int) -> dict:
    """Bytes a second: a copy of 2 GiB (read and write counted), and the better of two reductions
    that read as much."""
    source = torch.empty(512 << 20, device="cuda").normal_()
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    work = {
        "copy": (lambda: target.copy_(source), 2 * size),
        "sum": (lambda: source.sum(), size),
        "amax": (lambda: source.amax(), size),
    }
    for run, _ in work.values():
        run()
    samples = {name: [] for name in work}
    for _ in range(rounds):
        for name, (run, _) in work.items():
            samples[name].append(timer.sample("queued", run))
    rate = {name: work[name][1] / measure.quantile(x, 0.5) for name, x in samples.items()}
    return {"copy": rate["copy"], "read": max(rate["sum"], rate["amax"]), "card": card()}


def run(only: list[str], quick: bool, timer, save) -> list[measure.Row]:
    """All rows; `save(ceilings, rows)` after every group, so that a run cut short leaves them."""
    rounds = 5 if quick else 25
    top = {"first": ceilings(timer, rounds)}
    rates = "copy {copy:.3e} B/s, read {read:.3e} B/s, {card}"
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
    first, last = top["first"], top.get("last", top["first"])
    return (
        f"{about['gpu']}, driver {first['card'].get('driver_version')}, torch {about['torch']}, "
        f"Triton {about['triton']}, {about['date']}, commit {about['commit']}. bfloat16 unless "
        f"said, cold L2, medians. Floors: bytes over the copy rate of this run, "
        f"{first['copy'] / 1e12:.2f} TB/s ({last['copy'] / 1e12:.2f} at its end; read alone "
        f"{first['read'] / 1e12:.2f}); of the linear ops, the matrix products. "
        f"Peers: {versions}.\n\n"
    )


def main() -> int:
    names = list(dict.fromkeys(w.name for w in WORKLOADS))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", help=f"comma-separated: {', '.join(names)}", default="")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.json and gpu.md")
    parser.add_argument("--quick", action="store_true", help="first shapes, few rounds, no compile")
    args = parser.parse_args()
    only = [x for x in args.only.split(",") if x]
    if unknown := set(only) - set(names):
        parser.error(
            f"--only: unknown {', '.join(sorted(unknown))}; choose from {', '.join(names)}"
        )
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if klq.build_info().get("racecheck"):
        parser.error(
            "this build is for racecheck (make sanitize); build again without KLQ_RACECHECK"
        )
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    about = machine(seed)
    args.out.mkdir(parents=True, exist_ok=True)

    def save(top: dict, rows: list[measure.Row]) -> None:
        found = {"machine": about, "ceilings": top, "rows": [r.as_dict() for r in rows]}
        (args.out / "gpu.json").write_text(json.dumps(found, ensure_ascii=False) + "\n")
        (args.out / "gpu.md").write_text(heading(about, top) + measure.table(rows))

    rows = run(only, args.quick, measure.CudaTimer(), save)
    print("\n" + (args.out / "gpu.md").read_text())
    bad = [r for r in rows if r.status in ("wrong", "failed") and measure.is_ours(r.side)]
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
