# SPDX-License-Identifier: Apache-2.0
"""Figures of a run, from its JSON alone, and the generated parts of README.md.

    python -m benchmarks.figures                   # of the newest results in benchmarks/results
    python -m benchmarks.figures FILE.json ...     # of these, beside them
    python -m benchmarks.figures --readme          # and README.md's tables, from the newest results

A GPU run gives `<stem>-floor.png` (time over the floor, by op and shape), `-memory.png` and
`-roofline.png`, a CPU run `-speed.png`, both `-sweeps.png` if they have any. A PNG carries the hash
of the numbers it was drawn from, so that a test sees one that is out of date.
"""

import argparse
import hashlib
import io
import json
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import measure, names, runs, tables
from klq_kernels._registry import SPECS

WIDTH = 8.0  # inches; at 200 dpi twice the 800 pixels of a README
SETTINGS = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}


def plain(x: float, _=None) -> str:
    return f"{x:g}"


def rate(x: float) -> str:
    """A rate with its prefix: "4.26 T"."""
    return f"{x / 1e12:.3g} T" if x >= 1e12 else f"{x / 1e9:.3g} G"


def source(found: dict) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def style(side: str, **more) -> dict:
    _, color, marker = names.STYLES.get(names.family(side), (side, "#44AA99", "*"))
    edge = {} if marker in "xX|" else {"markeredgecolor": "black", "markeredgewidth": 0.5}
    return {"color": color, "marker": marker, **edge, **more}


def machine_line(found: dict) -> str:
    m = found["machine"]
    who = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads"
    return (
        f"{who}, torch {m['torch'].partition('+')[0]}, {m['date'][:10]}, commit {m['commit'][:7]}"
    )


def rows_of(found: dict, op: str) -> list[dict]:
    return [r for r in found["rows"] if r["op"] == op and r["kind"] == "queued" and "median" in r]


def legend(figure: Figure, handles: dict, found: dict, columns: int = 4) -> None:
    order = sorted(handles, key=lambda s: list(names.STYLES).index(names.family(s)))
    labels = [names.called(s, found["machine"]) for s in order]
    figure.legend(
        [handles[s] for s in order], labels, loc="outside lower center", ncols=columns, fontsize=9
    )


# --- time over the floor -----------------------------------------------------------------------

FLOORS = {  # op, and the sides that do all of its work
    "token_logprobs": "log-probs, forward (floor: one read)",
    "klq_loss, in place": "KLQ loss and gradient, forward and backward (floor: a read and a write)",
    "linear_klq_loss": "LM head and KLQ loss, forward and backward (floor: three GEMMs)",
}


def compared(found: dict, op: str) -> list[dict]:
    """One side a library: whole work, and the public way where there are two."""
    skipped = re.compile("forward alone|public|active|chunk of|GEMM")
    kept = [r for r in rows_of(found, op) if not skipped.search(r["side"])]
    best: dict[tuple, dict] = {}
    for r in kept:
        k = r["shape"], names.family(r["side"])
        best[k] = min(best.get(k, r), r, key=lambda r: r["median"])
    return list(best.values())


def floor_figure(found: dict) -> Figure:
    ops = [op for op in FLOORS if compared(found, op)]
    counts = [len({r["shape"] for r in compared(found, op)}) for op in ops]
    figure = Figure(figsize=(WIDTH, 1.3 + 0.38 * sum(counts) + 0.5 * len(ops)))
    axes = figure.subplots(len(ops), 1, squeeze=False, gridspec_kw={"height_ratios": counts})[:, 0]
    handles = {}
    for ax, op in zip(axes, ops, strict=True):
        rows = [r for r in compared(found, op) if r.get("floor")]
        shapes = list(dict.fromkeys(r["shape"] for r in rows))
        for r in rows:
            shift = {"cuda": -0.16, "triton": 0.16}.get(r["side"], 0.0)  # neither over the other
            (mark,) = ax.plot(
                r["median"] / r["floor"],
                shapes.index(r["shape"]) + shift,
                **style(r["side"], linestyle="", markersize=8),
            )
            handles.setdefault(names.family(r["side"]), mark)
        ax.axvline(1, color="black", linewidth=1)
        ax.set_xscale("log")
        ax.set_yticks(range(len(shapes)), shapes)
        ax.set_ylim(len(shapes) - 0.4, -0.6)
        ax.set_title(FLOORS[op], fontsize=10, loc="left", fontweight="bold")
        low, high = ax.get_xlim()
        ticks = (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 15) if high < 3 else (1, 1.5, 2, 3, 5, 10, 15)
        ax.set_xticks([t for t in ticks if low <= t <= high])
        ax.xaxis.set_major_formatter(FuncFormatter(plain))
        ax.xaxis.set_minor_locator(NullLocator())
    axes[-1].set_xlabel("time ÷ floor, as measured in the same run (log scale); less is better")
    figure.suptitle(machine_line(found) + "\ntokens × vocabulary, bfloat16, cold L2", fontsize=10)
    legend(figure, handles, found)
    return figure


# --- memory ------------------------------------------------------------------------------------


def memory_figure(found: dict) -> Figure:
    """Bars at the first shape of each op."""
    ops = [op for op in FLOORS if compared(found, op)]
    picked = {op: [r for r in compared(found, op) if "extra_bytes" in r] for op in ops}
    picked = {
        op: [r for r in rows if r["shape"] == rows[0]["shape"]] for op, rows in picked.items()
    }
    counts = [len(rows) for rows in picked.values()]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * sum(counts) + 0.4 * len(ops)))
    axes = figure.subplots(
        len(ops), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": counts}
    )[:, 0]
    for ax, (op, rows) in zip(axes, picked.items(), strict=True):
        rows = sorted(rows, key=lambda r: r["extra_bytes"])
        for i, r in enumerate(rows):
            gib = r["extra_bytes"] / 2**30
            ax.barh(i, gib, color=style(r["side"])["color"], edgecolor="black", linewidth=0.5)
            text = f"{gib:.2f}" if gib >= 0.01 else f"{gib * 1024:.2g} MiB"
            ax.annotate(text, (gib, i), (4, 0), textcoords="offset points", va="center")
        ax.set_yticks(range(len(rows)), [names.called(r["side"], found["machine"]) for r in rows])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.1)
        title = FLOORS[op].partition(" (")[0]
        ax.set_title(f"{title}, {rows[0]['shape']}", fontsize=10, loc="left")
    axes[-1].set_xlabel("peak memory of a call beyond its inputs, GiB; less is better")
    figure.suptitle(machine_line(found), fontsize=10)
    return figure


PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#7F7F7F"),
    *("#000000", "#882255", "#44AA99", "#999933", "#AA4499"),
)


# --- roofline ----------------------------------------------------------------------------------


def work(row: dict) -> float | None:
    """Operations of a row: its own, or the registry's for its op and shape; None if unknown."""
    if "flops" in row:
        return row["flops"]
    spec = SPECS.get(re.split("[ ,]", row["op"])[0])
    sizes = [int(x) for x in re.findall(r"\d+", row["shape"].partition(" ")[0])]
    if spec is None or not sizes or row["shape"].startswith("packed"):
        return None
    backward = spec.work[1] * ("forward" not in row["op"] and spec.kind == "linear")
    out = spec.work[0] + backward
    for n in sizes:
        out *= n
    return float(out)


def roofline_figure(found: dict) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.6))
    ax = figure.subplots()
    top = found["ceilings"].get("first", found["ceilings"])
    product = max((v for k, v in top.items() if k.startswith("matmul")), default=None)
    best: dict[tuple, tuple[float, float]] = {}
    for r in found["rows"]:
        if "median" not in r or not measure.is_ours(r["side"]) or not (flops := work(r)):
            continue
        if r["kind"] not in ("queued", "graph", "cpu") or "," in r["side"]:
            continue
        at = flops / r["bytes"], flops / r["median"]
        k = re.split(",", r["op"])[0], r["side"]
        best[k] = max(best.get(k, at), at, key=lambda p: p[1])
    if best:
        low = min(x for x, _ in best.values()) / 3
        high = max(max(x for x, _ in best.values()) * 3, 3 * (product or 0) / top["copy"])
        knee = [low, *([product / top["copy"]] if product else []), high]
        roof = [min(x * top["copy"], product or float("inf")) / 1e12 for x in knee]
        ax.plot(knee, roof, color="black", linewidth=1.5)
        text = f"copy {rate(top['copy'])}B/s"
        middle = (low * knee[1]) ** 0.5
        ax.annotate(text, (middle, middle * top["copy"] / 1e12), (8, -4),
                    textcoords="offset points", va="top", fontsize=9)  # fmt: skip
        if product:
            text = f"product {rate(product)}FLOP/s"
            ax.annotate(text, (high / 1.2, product / 1e12), (0, 4), ha="right",
                        textcoords="offset points", fontsize=9)  # fmt: skip
    ops = list(dict.fromkeys(op for op, _ in sorted(best)))
    for (op, side), (x, y) in sorted(best.items()):
        color = PALETTE[ops.index(op) % len(PALETTE)]
        size = 7 if side == "triton" else 11  # both are seen where they coincide
        ax.plot(x, y / 1e12, **{**style(side, linestyle="", markersize=size), "color": color})
    for i, op in enumerate(ops):
        ax.plot([], [], "s", color=PALETTE[i % len(PALETTE)], label=op)
    for side in dict.fromkeys(side for _, side in sorted(best)):
        grey = {**style(side, linestyle="", markersize=8), "color": "white"}
        ax.plot([], [], **grey, label=names.called(side, found["machine"]))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations a byte of the least traffic")
    ax.set_ylabel("TFLOP/s reached")
    ax.set_title(machine_line(found), fontsize=10)
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.yaxis.set_major_formatter(FuncFormatter(plain))
    ax.legend(loc="lower right", fontsize=9)
    return figure


PAGE = 4096  # what the resident set of a process is counted in


# --- sweeps ------------------------------------------------------------------------------------


def sweeps_figure(found: dict) -> Figure:
    """A row a sweep: time left, against the floor, and memory right, against the results alone."""
    sweeps = found["sweeps"]
    figure = Figure(figsize=(WIDTH, 0.9 + 2.1 * len(sweeps)))
    axes = figure.subplots(len(sweeps), 2, squeeze=False)
    handles = {}
    for (left, right), sweep in zip(axes, sweeps, strict=True):
        points = [p for p in sweep["points"] if p.get("rows")]
        sides = list(dict.fromkeys(r["side"] for p in points for r in p["rows"]))
        for side in sides:
            at = [
                (p["at"], r)
                for p in points
                for r in p["rows"]
                if r["side"] == side and "median" in r
            ]
            how = style(side, linewidth=1.3, markersize=5)
            of = "median" if "gpu" in found["machine"] else "min"
            (handles[side],) = left.plot([x for x, _ in at], [r[of] * 1e3 for _, r in at], **how)
            memory = [(x, max(r["extra_bytes"], PAGE) / 2**20) for x, r in at if "extra_bytes" in r]
            right.plot([x for x, _ in memory], [y for _, y in memory], **how)
        dashed = {"color": "black", "linestyle": "--", "linewidth": 1}
        at = [p["at"] for p in points]
        (line,) = left.plot(at, [p["rows"][0]["floor"] * 1e3 for p in points], **dashed)
        right.plot(at, [max(p["results_bytes"], PAGE) / 2**20 for p in points], **dashed)
        for ax, label in ((left, "ms"), (right, "MiB beyond inputs")):
            if sweep["axis"] != "active":
                ax.set_xscale("log", base=2)
                ax.set_xticks(at[:: 2 if len(at) > 8 else 1])  # labels that do not touch
                ax.set_yscale("log")
                low, high = ax.get_ylim()
                # a decade or two need labels between
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1,)))
                ax.yaxis.set_major_formatter(FuncFormatter(plain))
                ax.yaxis.set_minor_formatter(NullFormatter())
            else:
                ax.set_ylim(bottom=0)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            ax.tick_params(labelsize=8)
            ax.set_xlabel(sweep["label"], fontsize=9)
            ax.set_ylabel(label, fontsize=9)
        shape = points[-1]["shape"] if points else ""
        left.set_title(f"{sweep['op']} (last point: {shape})", fontsize=9, loc="left")
    order = sorted(handles, key=lambda s: list(names.STYLES).index(names.family(s)))
    labels = [names.called(s, found["machine"]) for s in order]
    figure.legend(
        [*(handles[s] for s in order), line], [*labels, "floor"],
        loc="outside lower center", ncols=5, fontsize=9,
    )  # fmt: skip
    figure.suptitle(machine_line(found), fontsize=10)
    return figure


# --- CPU ---------------------------------------------------------------------------------------


def speed_figure(found: dict) -> Figure:
    """A row an op and shape, a bar a dtype."""
    rows = [r for r in found["rows"] if "x_naive" in r]
    titles = list(dict.fromkeys((r["op"], r["shape"].split()[0]) for r in rows))
    colors = {"float32": "#0072B2", "bfloat16": "#E69F00"}
    figure = Figure(figsize=(WIDTH, 1.2 + 0.36 * len(titles)))
    ax = figure.subplots()
    for r in rows:
        shape, dtype = r["shape"].split()
        alone = sum((x["op"], x["shape"].split()[0]) == (r["op"], shape) for x in rows) == 1
        shift = 0.0 if alone else 0.2 if dtype == "bfloat16" else -0.2
        y, x, paged = titles.index((r["op"], shape)) + shift, r["x_naive"], r["x_naive_paged"]
        ax.barh(y, x, color=colors[dtype], height=0.4)
        ax.plot(paged, y, "D", color="white", markeredgecolor="black", markersize=4)
        text, right = f"{tables.number(x)}, {tables.number(paged)}", 1.06 * max(1.0, x, paged)
        ax.annotate(text, (right, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(range(len(titles)), [f"{op}  {shape}" for op, shape in titles], fontsize=8)
    ax.set_ylim(len(titles) - 0.4, -0.6)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.axvline(1, color="black", linewidth=1)
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("time of the faster naive side ÷ klq C++ (log scale); more is better")
    figure.suptitle(machine_line(found), fontsize=10)
    for dtype, color in colors.items():
        ax.barh(0, 0, color=color, label=f"{dtype}, memory kept between calls")
    paged = "memory paged in anew, as large blocks are by default"
    ax.plot([], [], "D", color="white", markeredgecolor="black", markersize=4, label=paged)
    figure.legend(loc="outside lower center", ncols=1, fontsize=9)
    return figure


# --- files -------------------------------------------------------------------------------------


def write(figure: Figure, path: Path, hashed: str) -> None:
    """With a palette of 256 colours, a quarter of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    info = PngInfo()
    info.add_text("Source", hashed)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        path, optimize=True, pnginfo=info
    )


def draw(found: dict, stem: Path) -> list[Path]:
    """All figures that these results have numbers for, as `<stem>-<name>.png`."""
    made = []
    with matplotlib.rc_context(SETTINGS):
        if "gpu" in found["machine"]:
            if any(compared(found, op) for op in FLOORS):
                made += [("floor", floor_figure(found)), ("memory", memory_figure(found))]
            made += [("roofline", roofline_figure(found))]
        elif any("x_naive" in r for r in found["rows"]):
            made += [("speed", speed_figure(found))]
        if found.get("sweeps"):
            made += [("sweeps", sweeps_figure(found))]
        paths = []
        for name, figure in made:
            path = stem.with_name(f"{stem.name}-{name}.png")
            write(figure, path, source(found))
            paths.append(path)
    return paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's tables")
    args = parser.parse_args(argv)
    files = args.files or [runs.latest(kind) for kind in ("cuda", "cpu")]
    for path in files:
        print(*draw(runs.load(path), path.with_suffix("")), sep="\n")
    if args.readme:
        tables.README.write_text(tables.readme(tables.README.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
