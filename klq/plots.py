# SPDX-License-Identifier: Apache-2.0
"""The curves of one or several runs as one figure, from nothing but their metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from klq.logging import CONFIG, METRICS, read_jsonl

PANELS = (
    (("objective/scores",), "score"),
    (("objective/kl",), "KL from the reference, a response (nats)"),
    (("objective/rlhf_reward",), "J = score - τ KL"),
    (("klq/residual_rms",), "residual Q - G (root mean square)"),
    (("klq/q_explained_variance",), "explained variance of Q"),
    (
        ("klq/grad_norm_policy", "klq/grad_norm_value"),
        "gradient norms: policy (full), value (dashed)",
    ),
)


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the runs (directories) over each other against episodes, and write the image `out`.

    A panel of which no run has the metric stays out. ValueError if a run has no metrics.
    """
    curves: dict[str, list[dict]] = {}
    for run in map(Path, runs):
        path = run / METRICS
        rows = read_jsonl(path) if path.is_file() else []
        if not rows:
            what = "holds no metrics" if run.is_dir() else "is no folder"
            raise ValueError(f"{run} {what}: give the output_dir of a run")
        config = run / CONFIG
        name = json.loads(config.read_text()).get("run_name") if config.is_file() else None
        name = name or run.name
        curves[name if name not in curves else str(run)] = rows
    every = {key for rows in curves.values() for row in rows for key in row}
    panels = [(keys, title) for keys, title in PANELS if every & set(keys)]

    figure = Figure(figsize=(12, 3.2 * -(-len(panels) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 3), 3, squeeze=False).flatten()
    for ax, (keys, title) in zip(axes, panels, strict=False):
        for color, (name, rows) in enumerate(curves.items()):
            for key, style in zip(keys, ("-", "--"), strict=False):
                points = [(row["episode"], row[key]) for row in rows if key in row]
                if points:
                    label = name if style == "-" else None
                    ax.plot(*zip(*points, strict=True), style, color=f"C{color}", label=label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("episodes")
        ax.grid(alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    if len(curves) > 1:
        figure.axes[0].legend(fontsize=8)
    out = Path(out)
    figure.savefig(out, dpi=120)
    return out
