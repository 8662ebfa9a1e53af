# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md, from committed results: `python -m benchmarks.figures --readme`.

Text between `<!-- benchmarks: gpu -->` (or cpu) and `<!-- end -->` is generated; a test holds it to
the newest results.
"""

import re
from pathlib import Path

from benchmarks import names, runs
from benchmarks.runs import line

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- benchmarks: (gpu|cpu) -->\n)(.*?)(<!-- end -->)", re.S)
SHAPES = ("8192×128256", "16384×50304", "8192×151936", "32768×32000", "2048×262144")
LOGITS = {
    "token_logprobs": (
        "`token_logprobs`, forward",
        ("cuda", "triton", "quack", "torch.compile", "trl", "eager float32"),
    ),
    "token_stats, with reference": (
        "`token_stats`: entropy, exact KL and log-ratio to a reference",
        ("cuda", "triton", "eager float32"),
    ),
    "klq_loss, in place": (
        "`klq_loss`, loss and gradient in place, with its backward",
        ("cuda", "triton", "liger", "quack, forward alone", "torch.compile", "eager float32"),
    ),
}
HEADS = {
    "linear_klq_loss": "`linear_klq_loss`, forward and backward",
    "linear_token_logprobs": "`linear_token_logprobs`, forward and backward, a gradient a token",
}
SCANS = ("64×1024", "512×2048", "4096×8192", "8×131072", "packed 131072+4096×1")


def number(x: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"


class Found:
    """Rows by op, shape, side and kind."""

    def __init__(self, found: dict):
        self.machine = found["machine"]
        self.rows = {runs.key(r): r for r in found["rows"]}

    def cell(self, op: str, shape: str, side: str, kind: str, scale: float) -> str:
        row = self.rows.get((op, shape, side, kind))
        if row is None or row["status"] == "absent":
            return "–"
        return number(row["median"] * scale) if "median" in row else row["status"]

    def median(self, op: str, shape: str, side: str, kind: str = "queued") -> float | None:
        return self.rows.get((op, shape, side, kind), {}).get("median")


def logits(found: Found) -> list[str]:
    out = [line(("ms", *SHAPES)), line(["---"] * (1 + len(SHAPES)))]
    for op, (title, sides) in LOGITS.items():
        for side in sides:
            cells = [found.cell(op, shape, side, "queued", 1e3) for shape in SHAPES]
            if side == "cuda":
                floors = [
                    found.rows.get((op, s, side, "queued"), {}).get("x_floor") for s in SHAPES
                ]
                cells = [
                    f"**{c}** {x:.2f} ×" if x else c for c, x in zip(cells, floors, strict=True)
                ]
            if set(cells) != {"–"}:
                out.append(
                    line(
                        (
                            title if side == "cuda" else f"– {names.called(side, found.machine)}",
                            *cells,
                        )
                    )
                )
    return out


def heads(found: Found) -> list[str]:
    """Times and memory; all of our CUDA sides, of other libraries' those fastest at some shape."""
    keys = [k for k in found.rows if k[0] in HEADS and k[3] == "queued" and "%" not in k[2]]
    shapes = list(dict.fromkeys(k[1] for k in keys))
    out = [line(("ms, GiB beyond the inputs", *shapes)), line(["---"] * (1 + len(shapes)))]
    for op, title in HEADS.items():
        shown = {k[2]: None for k in keys if k[0] == op and names.family(k[2]) == "cuda"}
        for shape in shapes:
            best: dict[str, str] = {}
            for k in keys:
                if k[:2] == (op, shape) and "median" in found.rows[k]:
                    family = names.family(k[2])
                    best[family] = min(
                        best.get(family, k[2]), k[2], key=lambda s: found.median(op, shape, s)
                    )
            shown |= dict.fromkeys(best.values())
        for side in sorted(shown, key=lambda s: list(names.STYLES).index(names.family(s))):
            cells = [found.cell(op, s, side, "queued", 1e3) for s in shapes]
            for i, shape in enumerate(shapes):
                extra = found.rows.get((op, shape, side, "queued"), {}).get("extra_bytes")
                cells[i] += f", {extra / 2**30:.2f}" if extra is not None else ""
            called = f"– {names.called(side, found.machine)}"
            first = title + side.removeprefix("cuda")
            out.append(line((first if names.family(side) == "cuda" else called, *cells)))
    return out if len(out) > 2 else []


def scans(found: Found) -> list[str]:
    out = [line(("µs", *SCANS)), line(["---"] * (1 + len(SCANS)))]
    for op in ("lambda_returns", "gae"):
        for side, kind in (("cuda", "graph"), ("triton", "graph"), ("eager loop", "call hot")):
            cells = [found.cell(op, shape, side, kind, 1e6) for shape in SCANS]
            loop = f"– {names.called(side, found.machine)}, hot"
            title = {"cuda": f"`{op}`", "triton": "– klq Triton"}.get(side, loop)
            if set(cells) != {"–"}:
                out.append(line((title, *cells)))
    return out


def notes(found: Found) -> str:
    """What the tables do not hold: wrong peers, masked rows, targets in one launch."""
    said = []
    for (op, shape, side, _), row in found.rows.items():
        if row["status"] == "wrong" and op in LOGITS and side in LOGITS[op][1]:
            called = names.called(side, found.machine)
            said.append(f"Wrong: {called} at {shape}, {row['reason'].partition(':')[2].strip()}.")
    op, shape = "13 % of rows active", "8192×128256"
    parts = []
    for name in ("token_logprobs", "klq_loss"):
        some, every = (found.median(op, shape, f"{name} cuda{x}") for x in (", masked", ""))
        if some and every:
            parts.append(f"{some / every:.2f} for `{name}`")
    if parts:
        said.append(f"Time with 13 % of the rows active, over that of all: {', '.join(parts)}.")
    targets = []
    for (op, shape, side, _), r in found.rows.items():
        apart = found.median(op, shape, "cuda, two launches")
        if op == "klq_targets" and side == "cuda" and "x_floor" in r and apart:
            over = r["median"] / apart
            targets.append(f"{r['x_floor']:.2f} × ({over:.3f} of two launches) at {shape}")
    if targets:
        said.append(f"`klq_targets`, logits of both models to λ-returns: {', '.join(targets)}.")
    return " ".join(said)


def host(found: Found) -> str:
    """What an eager call costs where the kernel is shorter than its launch."""
    small = [shape for shape in SCANS if shape != "4096×8192"]
    said = []
    for side in ("cuda", "triton"):
        ends = []
        for kind in ("host", "call"):
            times = [
                1e6 * t
                for op in ("lambda_returns", "gae")
                for shape in small
                if (t := found.median(op, shape, side, kind))
            ]
            ends += [f"{min(times):.0f} to {max(times):.0f}"] if times else []
        if len(ends) == 2:
            called = names.called(side, found.machine)
            said.append(f"{called} {ends[0]} µs in a row and {ends[1]} from an idle device")
    text = "; ".join(said)
    return f"An eager call, all but the third shape: {text}." if said else ""


def gpu(path: Path) -> str:
    data = runs.load(path)
    found, about = Found(data), data["machine"]
    copy = data["ceilings"]["first"]["copy"] / 1e12
    here = f"benchmarks/results/{path.stem}"
    head = (
        f"One {about['gpu']}, torch {about['torch'].partition('+')[0]}, Triton {about['triton']}, "
        f"{about['date'][:10]}, commit {about['commit'][:7]}; bfloat16, cold L2, medians, all "
        f"sides interleaved on the same data. × is the time of one read (of a read and a write, "
        f"for the gradient) at the copy rate of the run, {copy:.2f} TB/s; below 1, reading alone "
        f"is faster than copying. [Every row]({here}.md), [every sample of this run]({here}.json)."
    )
    figure = f'<img src="{here}-floor.png" width="800" alt="Time over floor, by op and shape">'
    scan = "Scans in a CUDA graph, inputs cold, float32, masked:"
    tables = ["\n".join(write(found)) for write in (logits, heads, scans)]
    parts = [head, figure, *tables[:2], notes(found), scan, tables[2], host(found)]
    return "\n\n".join(p for p in parts if p) + "\n"


CPU = ("token_logprobs, forward", "klq_loss, step", "klq_targets", "lambda_returns", "gae")


def cpu(path: Path) -> str:
    """A line an op: its first shape, in each dtype."""
    data = runs.load(path)
    about, rows = data["machine"], data["rows"]
    here = f"benchmarks/results/{path.stem}"
    heads = ("", "naive ms", "klq C++ ms", "", "naive, paged", "klq C++, paged", "")
    heads += ("unpaged, two runs",)
    out = [
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch'].partition('+')[0]}, "
        f"{about['date'][:10]}, commit {about['commit'][:7]}; minima. Naive is the faster of the "
        f"shortest eager PyTorch and our reference. Memory stays with the process between calls, "
        f"naive code's best case, or is paged in anew, as large blocks are by "
        f"default ([every op]({here}.md)). Unstable: more than 15 % between two runs:\n",
        line(heads),
        line(["---"] * len(heads)),
    ]
    for op in CPU:
        mine = [r for r in rows if r["op"] == op and r["side"] == "cpp"]
        first = mine[0]["shape"].split()[0] if mine else ""
        for r in (x for x in mine if x["shape"].split()[0] == first):
            name, _, way = op.partition(",")
            cells = [f"`{name}`{',' * bool(way)}{way}, {r['shape']}"]
            for ratio, time in (("x_naive", "min"), ("x_naive_paged", "paged")):
                cells += [number(r[ratio] * r[time] * 1e3), number(r[time] * 1e3)]
                cells += [f"{number(r[ratio])} ×"]
            out.append(line((*cells, runs.unstable(r, runs.naive(r, rows)))))
    return "\n".join(out) + "\n"


def readme(text: str, folder: Path = runs.RESULTS) -> str:
    """The text with its blocks as the newest results have them."""
    make = {"gpu": ("cuda", gpu), "cpu": ("cpu", cpu)}

    def block(match: re.Match) -> str:
        kind, write = make[match[2]]
        return match[1] + write(runs.latest(kind, folder)) + match[4]

    return BLOCK.sub(block, text)
