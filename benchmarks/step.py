# SPDX-License-Identifier: Apache-2.0
"""One whole iteration by phases, KLQ's beside others': `python -m benchmarks.step`.

    python -m benchmarks.step --size tiny                              # on a CPU, a minute
    python -m benchmarks.step --size pythia-1b --trl .venv-trl/bin/python   # make trl-env makes it

Random weights, the same batch, dtype and epochs for all; no response ends early. Rows: the loop as
it is, with a separate value model, which is what TRL has; the same with eager mathematics (backend
"reference"); the loop with its default, a value head; TRL's PPO, in a process of its own and before
ours. Phases: rollout, targets (everything without gradients between rollout and update), update.
Leaves `<date>-<machine>-step.json` and `.md`.
"""

import argparse
import gc
import json
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks import runs, step_model
from benchmarks.step_model import EPOCHS, PHASES, REPEATS, SIZES, WARM, Stopwatch
from klq import KLQConfig, KLQTrainer
from klq.logging import Clock
from klq_kernels import use_backend

ROOT = Path(__file__).resolve().parents[1]


def ours(size: step_model.Size, device: str, value_model: str, repeats: int = REPEATS) -> dict:
    """Phases of our loop with the current backend."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = KLQTrainer(
            step_model.policy(size, device),
            lambda completions, **_: [float(len(set(c)) % 7) for c in completions],
            KLQConfig(
                output_dir=folder,
                per_device_train_batch_size=size.micro,
                gradient_accumulation_steps=size.prompts // size.micro,
                update_epochs=EPOCHS,
                max_completion_length=size.response,
                learning_rate=1e-6,
                use_cpu=device == "cpu",
            ),
            [{"prompt_ids": ids} for ids in step_model.prompts(size)],
            value_model=value_model,
        )
    watch = Stopwatch(device)
    for i in range(WARM + repeats):
        rows, ids = trainer.train_prompts.take(i * size.prompts, size.prompts)
        watch.start()
        batch = trainer.sample(rows, ids, Clock())
        watch.lap("rollout")
        trainer.measure(batch)
        watch.lap("targets")
        trainer.learn(batch)
        watch.lap("update")
    return watch.found()


def theirs(python: Path, name: str, device: str) -> dict:
    """TRL's phases, from the environment of `python`."""
    command = [str(python), "-m", "benchmarks.trl_step", "--size", name, "--device", device]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(found: dict) -> str:
    heads = ("", *(f"{p} ms" for p in PHASES), "all ms", *(f"{p} peak GiB" for p in PHASES))
    out = [runs.line(heads), runs.line(["---"] * len(heads))]
    for name, row in found["loops"].items():
        times = [row[p]["median_s"] * 1e3 for p in PHASES]
        peaks = [f"{row[p]['peak_bytes'] / 2**30:.2f}" for p in PHASES]
        out.append(runs.line((name, *(f"{t:.1f}" for t in (*times, sum(times))), *peaks)))
    return "\n".join(out) + "\n"


def heading(found: dict) -> str:
    about, size = found["machine"], found["settings"]
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    return (
        f"{where}, torch {about['torch']}, {about['date']}, commit {about['commit']}. GPT-NeoX, "
        f"{size['layers']} layers × {size['hidden']}, vocabulary {size['vocabulary']}, random "
        f"weights, {size['dtype']}; {size['prompts']} prompts of {size['prompt']} tokens, "
        f"responses of {size['response']}, {EPOCHS} epochs in passes of {size['micro']} rows. "
        f"Medians of {REPEATS} iterations after {WARM}; peaks of "
        + ("the allocator" if "gpu" in about else "the process")
        + ".\n\n"
    )


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="pythia-1b" if gpu else "tiny")
    parser.add_argument("--trl", type=Path, help="a Python with trl==1.12.0")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results"
    )
    args = parser.parse_args(argv)
    size, device = SIZES[args.size], "cuda" if gpu else "cpu"
    loops = {}
    if args.trl:
        made = theirs(args.trl, args.size, device)
        loops[f"TRL {made['versions']['trl']} PPO"] = made
    torch.manual_seed(0)
    for name, backend, value_model in (
        ("klq, separate value model", None, "separate"),
        ("klq, eager mathematics", "reference", "separate"),
        ("klq, value head", None, "head"),
    ):
        if backend:
            with use_backend(backend):
                loops[name] = ours(size, device, value_model)
        else:
            loops[name] = ours(size, device, value_model)
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    from benchmarks import cpu
    from benchmarks import gpu as on_gpu

    settings = size._asdict() | {"name": args.size, "dtype": str(size.dtype)}
    about = on_gpu.machine(0) if gpu else cpu.machine()
    found = {"machine": about, "settings": settings, "loops": loops}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{runs.stem(about)}-step.json"
    path.write_text(json.dumps(found) + "\n")
    text = heading(found) + table(found)
    path.with_suffix(".md").write_text(text)
    print(f"{text}\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
