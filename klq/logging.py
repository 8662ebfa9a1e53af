# SPDX-License-Identifier: Apache-2.0
"""What a run tells people and machines while it goes.

Always three files in output_dir: `config.json`, `metrics.jsonl` (one line an update) and
`samples.jsonl`. A line is flushed as it is written. Resuming cuts both back to the update of the
checkpoint, so that the curves are those of a run that was never interrupted. If a line cannot be
written (a full disk), the run stops with that error: its last checkpoint is whole, and a run
without its record is worth less than a stopped one.

Metrics, averaged over active tokens (kl, scores: over responses) and over processes:

    objective/kl                 sum over the response of log pi - log pi_ref, before the update
    objective/scores             weighted sum of the reward functions, less a missing_eos_penalty;
                                 rewards/<name>: each function alone
    objective/rlhf_reward        scores - tau * kl
    objective/entropy            of the policy, a token
    klq/residual_rms             root mean square of Q - G over the update's optimiser steps
    klq/q_explained_variance     1 - Var(G - Q) / Var(G) at alpha = 1, before the update
    klq/grad_norm_policy         norm of the gradient the policy part sends into the trunk's output,
                                 root mean square over optimiser steps
    klq/grad_norm_value          the same of the value part, after value_trunk_grad_scale
    grad_norm                    norm over all parameters, before clipping
    loss/policy_avg, loss/value_avg, policy/clipfrac_avg, policy/approxkl_avg     PPO only
    completions/mean_length, completions/truncated        active tokens; share cut by length
    rollout/logprob_gap          mean |engine's log-prob - ours|, if the engine gives its own
    tokens/s                     active tokens of the update by its whole time
    time/rollout, time/rewards, time/measure, time/update      host seconds
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from klq.config import KLQConfig

METRICS, SAMPLES, CONFIG = "metrics.jsonl", "samples.jsonl", "config.json"


def read_jsonl(path: Path) -> list[dict]:
    """The complete lines of a file; a last line torn by a crash is left out."""
    lines = []
    for line in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def cut_jsonl(path: Path, update: int) -> None:
    """Drop what a file says about updates after `update`, by rewriting and renaming it."""
    path = Path(path)
    kept = [row for row in read_jsonl(path) if row["update"] <= update] if path.exists() else []
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)


class Clock:
    """Host seconds of the phases of one update. The two last phases each end in a sync."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.times: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[f"time/{name}"], self.last = now - self.last, now

    def metrics(self, tokens: float) -> dict[str, float]:
        return {"tokens/s": tokens / (self.last - self.start), **self.times}


def add_sums(sums: dict[str, Tensor | float], more: dict[str, Tensor | float]) -> None:
    """Add `more` into `sums`, name by name."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of squares about the mean, of the active entries."""
    mean = torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
    return torch.where(mask, x - mean, 0.0).pow(2).sum()


def objective_metrics(sums: dict[str, float], tau: float) -> dict[str, float]:
    """The metrics of sampling and targets, from the sums of `KLQTrainer.measure`."""
    n, tokens = sums["responses"], max(sums["tokens"], 1.0)
    scores, kl, spread = sums["scores"] / n, sums["kl"] / n, sums["target_sq"]
    metrics = {
        "objective/kl": kl,
        "objective/scores": scores,
        "objective/rlhf_reward": scores - tau * kl,
        "objective/entropy": sums["entropy"] / tokens,
        "klq/q_explained_variance": 1 - sums["advantage_sq"] / spread if spread > 0 else 0.0,
        "completions/mean_length": sums["tokens"] / n,
        "completions/truncated": sums["truncated"] / n,
    }
    means = {name.removesuffix("/sum") for name in sums if name.endswith("/sum")}
    for name in sorted(means):
        if sums[f"{name}/count"] > 0:
            metrics[name] = sums[f"{name}/sum"] / sums[f"{name}/count"]
    return metrics


def update_metrics(sums: dict[str, float], processes: int) -> dict[str, float]:
    """The metrics of the optimiser steps, from the sums of `KLQTrainer.learn`.

    `tokens` is the total of all processes on each of them, and the losses were scaled by
    `processes` before their backward; both are undone here.
    """
    steps, tokens = sums["steps"], max(sums["tokens"] / processes, 1.0)
    metrics = {"grad_norm": sums["grad_norm"] / steps}
    for part in ("policy", "value"):
        square = sums.get(f"grad_{part}_sq", 0.0)
        metrics[f"klq/grad_norm_{part}"] = math.sqrt(square / (processes * steps))
    if "residual_sq" in sums:
        metrics["klq/residual_rms"] = math.sqrt(sums["residual_sq"] / tokens)
    metrics |= {name: total / tokens for name, total in sums.items() if name.endswith("_avg")}
    return metrics


class RunLog:
    """Files, progress and sample table of the main process; silent on the others.

    update: the update the run stands at; 0 for a new run.

    Progress goes to stderr: on a terminal a bar that is drawn over, anywhere else (a file, a
    scheduler's log) plain lines, for the first update, for every tenth of the run and for the last:

        update 40/400: reward=0.512 kl=0.131 residual=0.0187, 1.93 s/update

    with the time of an update, its evaluation and checkpoint included, since the line before.
    """

    def __init__(self, args: KLQConfig, update: int, *, main: bool) -> None:
        self.args, self.main = args, main
        self.directory = Path(args.output_dir)
        self.files: dict[str, TextIO] = {}
        if main:
            (self.directory / CONFIG).write_text(json.dumps(asdict(args), indent=1) + "\n")
            for name in (METRICS, SAMPLES):
                cut_jsonl(self.directory / name, update)
                self.files[name] = open(self.directory / name, "a")  # noqa: SIM115
        shown, terminal = main and not args.disable_tqdm, sys.stderr.isatty()
        self.bar = tqdm(
            total=args.num_updates,
            initial=update,
            unit="update",
            disable=not (shown and terminal),
        )
        self.plain = shown and not terminal
        self.lines_every = math.ceil(args.num_updates / 10)
        self.first, self.told = update + 1, (update, time.perf_counter())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        for file in self.files.values():
            file.close()

    def metrics(self, metrics: dict[str, float]) -> None:
        """Write one update's line and show the progress."""
        self._write(METRICS, metrics)
        names = {"reward": "objective/scores", "kl": "objective/kl", "residual": "klq/residual_rms"}
        shown = {k: f"{metrics[v]:.3g}" for k, v in names.items() if v in metrics}
        self.bar.update()
        self.bar.set_postfix(shown)
        update, total = metrics["update"], self.args.num_updates
        due = update in (self.first, total) or update % self.lines_every == 0
        if self.plain and due:
            (before, then), now = self.told, time.perf_counter()
            self.told = update, now
            text = " ".join(f"{k}={v}" for k, v in shown.items())
            pace = f"{(now - then) / (update - before):.3g} s/update"
            print(f"update {update}/{total}: {text}, {pace}", file=sys.stderr, flush=True)

    def samples(self, update: int, samples: list[dict[str, Any]]) -> None:
        """Write samples (prompt, completion, score, finish_reason) and show them as a table."""
        for sample in samples:
            self._write(SAMPLES, {"update": update, **sample})
        if self.main and not self.args.disable_tqdm:
            tqdm.write(f"--- samples at update {update}: score | prompt | completion")
            for s in samples:
                prompt, completion = _short(s["prompt"], 40, end=True), _short(s["completion"], 60)
                tqdm.write(f"{s['score']:8.3f} | {prompt} | {completion}")

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if not self.main:
            return
        try:
            self.files[name].write(json.dumps(row) + "\n")
            self.files[name].flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot be written ({error.strerror}); the run stops, resume from its checkpoint",
                str(self.directory / name),
            ) from error


def _short(value: Any, width: int, end: bool = False) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    if len(text) > width:
        text = "…" + text[1 - width :] if end else text[: width - 1] + "…"
    return text.ljust(width)
