# SPDX-License-Identifier: Apache-2.0
"""Results as files: `results/<date>-<machine>.json`, one a run, and how two runs are compared.

    python -m benchmarks.runs OLD.json NEW.json   # what got slower; exit code 1 if anything did

A row is found again by op, shape, side and kind. Its time is the median on a GPU and the minimum on
a CPU, where others work too. Two runs of one commit should agree within `LIMITS`; a row that does
not is unstable. Between commits a fused side got slower if its time grew beyond the limit and its
time over the naive side's, measured in the same run, grew as well: a slow day moves the first
alone. On another machine the second decides alone.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
from pathlib import Path

from benchmarks.measure import UNSTABLE, is_ours

RESULTS = Path(__file__).parent / "results"
LIMITS = {"cuda": UNSTABLE, "cpu": 0.15}
NAIVE = ("eager", "eager float32", "eager loop", "reference")


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    here = ("git", "-C", str(Path(__file__).parent))
    dirty = "+changes" if output_of(*here, "status", "--porcelain", "-uno") else ""
    found = output_of(*here, "rev-parse", "--short=12", "HEAD")
    return os.environ.get("KLQ_COMMIT") or (found + dirty if found else "unknown")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")


def device(found: dict) -> str:
    return "cuda" if "gpu" in found["machine"] else "cpu"


def stem(machine: dict) -> str:
    """2026-11-23-h200; the second run of a day takes the place of the first."""
    name = machine["gpu"].removeprefix("NVIDIA ").split()[0] if "gpu" in machine else "cpu"
    return f"{machine['date'][:10]}-{re.sub('[^a-z0-9]+', '-', name.lower())}"


def save(folder: Path, found: dict, table: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(found['machine'])}.json"
    path.write_text(json.dumps(found, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(table)
    return path


def load(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def latest(kind: str, folder: Path = RESULTS) -> Path:
    """The newest file of a device, by its date; kind is "cuda" or "cpu"."""
    dated = sorted(folder.glob("????-??-??-*.json"))
    found = [p for p in dated if not p.stem.endswith("-step") and device(load(p)) == kind]
    if not found:
        raise FileNotFoundError(f"{folder} has no results of kind {kind}")
    return found[-1]


def line(cells) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def naive(fused: dict, rows: list[dict]) -> dict:
    """The fastest naive row of the same op and shape, on a CPU."""
    same = (r for r in rows if (r["op"], r["shape"]) == (fused["op"], fused["shape"]))
    return min((r for r in same if r["side"] in NAIVE), key=lambda r: r["min"])


def unstable(*rows: dict) -> str:
    """What a table says of CPU rows whose minima differed between runs, if they did."""
    moved = max(r.get("spread") or 0.0 for r in rows)
    return f"**unstable**: ± {moved:.0%}" if moved > LIMITS["cpu"] else ""


# --- two runs ----------------------------------------------------------------------------------


def key(row: dict) -> tuple[str, ...]:
    return row["op"], row["shape"], row["side"], row["kind"]


def times(found: dict) -> dict[tuple, float]:
    of = "median" if device(found) == "cuda" else "min"
    return {key(r): r[of] for r in found["rows"] if of in r}


def spreads(runs: list[dict]) -> dict[tuple, float]:
    """For rows that all runs have: the longest of their times over the shortest, less 1."""
    each = [times(run) for run in runs]
    shared = [k for k in each[0] if all(k in t for t in each)]
    return {k: max(t[k] for t in each) / min(t[k] for t in each) - 1 for k in shared}


def over_naive(t: dict[tuple, float]) -> dict[tuple, float]:
    """Time over that of the fastest naive side of the same op, shape and kind, where there is one;
    loops over time are measured hot alone."""
    shortest: dict[tuple, float] = {}
    for (op, shape, side, kind), x in t.items():
        if side in NAIVE:
            for of in (kind, kind.removesuffix(" hot")):
                shortest[op, shape, of] = min(x, shortest.get((op, shape, of), x))
    return {
        k: x / shortest[k[0], k[1], k[3]] for k, x in t.items() if (k[0], k[1], k[3]) in shortest
    }


def slower(old: dict, new: dict) -> dict[tuple, tuple[float, float | None]]:
    """Fused rows that got slower: how many times, alone and over the naive side."""
    limit = 1 + LIMITS[device(new)]
    before, after = times(old), times(new)
    bases = over_naive(before), over_naive(after)
    name = "gpu" if device(new) == "cuda" else "cpu"
    same = old["machine"].get(name) == new["machine"].get(name)
    found = {}
    for k in after.keys() & before.keys():
        alone = after[k] / before[k]
        ratio = bases[1][k] / bases[0][k] if k in bases[0] and k in bases[1] else None
        grew = [alone] * same + [ratio] * (ratio is not None)
        if is_ours(k[2]) and grew and all(x > limit for x in grew):
            found[k] = alone, ratio
    return dict(sorted(found.items()))


def lost(old: dict, new: dict) -> list[tuple]:
    """Rows that had a number and have none: wrong now, or gone."""
    return sorted(k for k in times(old).keys() - times(new).keys() if is_ours(k[2]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runs", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    old, new = load(args.old), load(args.new)
    moved = spreads([old, new])
    limit = LIMITS[device(new)]
    calm = sum(x <= limit for x in moved.values())
    print(f"{calm} of {len(moved)} rows agree within {limit:.0%}")
    grown, gone = slower(old, new), lost(old, new)
    for k, (alone, ratio) in grown.items():
        base = "" if ratio is None else f", {ratio:.2f} × over the naive side"
        print(f"slower: {', '.join(k)}: {alone:.2f} ×{base}")
    for k in gone:
        print(f"no number any more: {', '.join(k)}")
    return 1 if grown or gone else 0


if __name__ == "__main__":
    raise SystemExit(main())
