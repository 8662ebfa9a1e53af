# SPDX-License-Identifier: Apache-2.0
"""The suite around the measurements: the registry's jobs hold what they are given to the truth, a
planted slow-down and a planted error are caught, and what is committed agrees with itself."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind an installed klq

from benchmarks import (
    clocks,
    cpu,
    figures,
    gpu,
    jobs,
    measure,
    names,
    runs,
    step,
    sweeps,
    tables,
    workloads,
)
from benchmarks.__main__ import main as bench
from benchmarks.jobs import Job
from klq.cli import main as klq

TINY = {
    "rows": ((70,), 33, 1),
    "scan": ((3, 9), 1, 1),
    "targets": ((3, 7), 33, 1),
    "linear": ((70,), 33, 8),
}
WAYS = list(dict.fromkeys((j.name, j.way, j.dtype) for j in jobs.jobs("cpu")))


def tiny(name: str, way: str, dtype=torch.float32, active: int = 100) -> Job:
    return Job(name, way, dtype, TINY[jobs.SPECS[name].kind], "cpu", active)


def result_of(job: Job, side: str) -> list[torch.Tensor]:
    made = jobs.given(job)
    return jobs.call(job, made.inputs, side, made.upstream)()


@pytest.mark.parametrize(("name", "way", "dtype"), WAYS, ids=lambda x: str(x))
def test_every_side_does_the_work_of_its_op(name, way, dtype):
    job = tiny(name, way, dtype)
    assert "cpp" in job.sides and "reference" in job.sides
    for side in job.sides:
        assert measure.wrong(jobs.checks(job, side, result_of(job, side))) is None, side


@pytest.mark.parametrize(("name", "way"), list(dict.fromkeys(x[:2] for x in WAYS)))
def test_a_planted_error_gets_no_number(name, way):
    """One entry of one of the results, in a row that is looked at."""
    job = tiny(name, way)
    got = [x.detach().clone() for x in result_of(job, "cpp")]
    assert measure.wrong(jobs.checks(job, "cpp", got)) is None
    whole = next(
        i for i in reversed(range(len(got))) if jobs.given(job).per_row(jobs.given(job).truth[i])
    )
    got[whole].view(-1)[0] += 0.5
    assert "beyond" in measure.wrong(jobs.checks(job, "cpp", got))


def test_a_masked_job_has_its_share_and_its_floor():
    job = tiny("klq_loss", "step", active=50)
    made = jobs.given(job)
    assert int(made.inputs["mask"].sum()) == 35 and "eager" not in job.sides
    assert measure.wrong(jobs.checks(job, "cpp", result_of(job, "cpp"))) is None
    assert jobs.cost(job).flops == jobs.cost(tiny("klq_loss", "step")).flops // 2


def test_costs_and_floors():
    job = tiny("token_logprobs", "forward", torch.bfloat16)
    least = jobs.cost(job)
    assert least.bytes == 70 * 33 * 2 + 70 * 12  # an id of 8 and a result of 4 bytes
    assert jobs.floor(job, least, {"copy": 1e3}) == pytest.approx(least.bytes / 1e3)
    top = {"copy": 1e3, "matmul float32": 1e3}
    head = tiny("linear_token_logprobs", "step")
    assert jobs.cost(head).flops == (2 + 6) * 70 * 33 * 8
    assert jobs.floor(head, jobs.cost(head), top) == pytest.approx(jobs.cost(head).flops / 1e3)


# --- two runs ----------------------------------------------------------------------------------


def found(cpp: float, eager: float = 9.0, machine: str = "one", **more) -> dict:
    row = {"op": "gae", "shape": "3×9 float32", "kind": "cpu", "status": "ok"}
    rows = [row | {"side": s, "min": x} for s, x in (("cpp", cpp), ("eager", eager))]
    return {"machine": {"cpu": machine, "date": "2026-01-02T03:04"}, "rows": rows, **more}


KEY = ("gae", "3×9 float32", "cpp", "cpu")


@pytest.mark.parametrize(
    ("new", "caught"),
    [
        (found(1.2), True),  # 20 % slower
        (found(1.04), False),
        (found(1.3, 9.0 * 1.3), False),  # a slow day: everything is slower
        (found(0.7, 5.0), False),
        (found(1.2, machine="another"), True),
        (found(2.0, 18.0, machine="another"), False),
    ],
)
def test_the_gate_on_time_and_on_the_ratio_to_naive(new, caught, tmp_path):
    assert (KEY in runs.slower(found(1.0), new)) == caught
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, made in zip(files, (found(1.0), new), strict=True):
        path.write_text(json.dumps(made))
    assert runs.main(list(map(str, files))) == int(caught)


def test_a_number_that_is_gone_is_reported():
    new = found(1.0)
    del new["rows"][0]["min"]
    assert runs.lost(found(1.0), new) == [KEY]


def test_on_a_gpu_medians_count_and_five_per_cent():
    rows = [{"op": "a", "shape": "1", "side": "cuda", "kind": "queued", "median": 1.0, "min": 9.0}]
    old = {"machine": {"gpu": "NVIDIA H200"}, "rows": rows}
    new = {"machine": {"gpu": "NVIDIA H200"}, "rows": [rows[0] | {"median": 1.06}]}
    assert runs.spreads([old, new]) == {("a", "1", "cuda", "queued"): pytest.approx(0.06)}
    assert runs.slower(old, new)


def test_rows_that_move_are_marked_unstable():
    row = measure.Row("a", "1", "cuda", "queued", samples=[1.0], floor=1.0, spread=0.08)
    scan = measure.Row("a", "2", "cuda", "graph", samples=[1.0], floor=1.0, spread=0.2)
    text = measure.table([row, scan])
    assert "**unstable**: ± 8%" in text and "graph **unstable**: ± 20%" in text
    row.spread = scan.spread = 0.04
    assert "unstable" not in measure.table([row, scan])
    calm, moved = {"spread": 0.14}, {"spread": 0.16}
    assert not runs.unstable(calm, {}) and "± 16%" in runs.unstable(calm, moved)


def test_a_planted_slow_down_of_20_per_cent_is_measured_and_caught():
    """By the clock: the same kernel, and the same kernel with a fifth of its time added."""
    job = Job("token_logprobs", "forward", torch.float32, ((64,), 4096, 1), "cpu")
    made = jobs.given(job)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads wait for each other where others use the cores
    try:
        sides = {s: jobs.call(job, made.inputs, s, None) for s in ("cpp", "eager")}
        least = jobs.best(sides["cpp"], 30)

        def slowed():
            begun = time.perf_counter()
            sides["cpp"]()
            end = time.perf_counter() + 0.2 * max(least, time.perf_counter() - begun)
            while time.perf_counter() < end:
                pass

        plans = {"base": sides["cpp"], "again": sides["cpp"], "slowed": slowed}
        plans["eager"] = sides["eager"]
        for _ in range(4):  # others may take the core for all of an attempt
            times = {name: [] for name in plans}
            for turn in range(400):
                order = list(plans.items())  # rotated: what ran before shows in the caches
                for name, run in order[turn % 4 :] + order[: turn % 4]:
                    begun = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - begun)
            low = {name: min(x) for name, x in times.items()}
            old, same, new = (
                found(low[name], low["eager"]) for name in ("base", "again", "slowed")
            )
            if KEY in runs.slower(old, new) and not runs.slower(old, same):
                return
    finally:
        torch.set_num_threads(threads)
    pytest.fail(f"minima {low}")


# --- commands ----------------------------------------------------------------------------------


def test_klq_bench_on_the_cpu_ends_with_a_table_and_a_figure(tmp_path):
    """Through the command, pytest-benchmark, our JSON, the table and the figure; twice."""
    command = ["bench", "--device", "cpu", "--only", "place_scores", "--quick", "--repeat", "2"]
    code = "import sys; from klq.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(cpu.HERE.parent)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("*-cpu.json")
    made = json.loads(path.read_text())
    assert {"copy", "read", "matmul float32"} <= set(made["ceilings"])
    (mine,) = [r for r in made["rows"] if r["side"] == "cpp"]
    assert (
        mine["x_naive"] > 0
        and mine["x_naive_paged"] > 0
        and mine["spread"] >= 0
        and mine["n"] == len(mine["samples"])
    )
    assert "| place_scores | 64×1024 float32 |" in done.stdout
    assert [len(run) for run in made["earlier"]] == [len(made["rows"])]
    assert path.with_name(f"{path.stem}-speed.png").exists()


def without_a_gpu(monkeypatch, seconds):
    """`klq bench` on a GPU but the GPU: two groups of two sides, whose samples are `seconds`; after
    the last somebody presses Ctrl-C."""
    seconds = iter(seconds)

    class Given(Timer):
        def sample(self, kind, run):
            for x in seconds:
                return x
            raise KeyboardInterrupt

    def build(*shape, compiles):
        group = workloads.token_logprobs(*shape, device="cpu", compiles=compiles)
        group.sides = [s for s in group.sides if s.name in ("cpp", "eager float32")]
        return group

    about = {"date": "2026-01-02T03:04", "gpu": "NVIDIA H200", "torch": "2", "triton": "3"}
    about |= {"commit": "0" * 12, "peers": {"torch": "2"}}
    top = {"copy": 1e9, "read": 1e9, "matmul": 1e12, "card": {}}
    monkeypatch.setattr(gpu, "WORKLOADS", (workloads.Workload("one", build, ((70, 33), (71, 33))),))
    monkeypatch.setattr(gpu, "machine", lambda seed: about)
    monkeypatch.setattr(gpu, "ceilings", lambda timer, rounds: top)
    monkeypatch.setattr(gpu, "Clocks", lambda: clocks.Clocks(("printf", "1, 2, 3, 4\\n")))
    monkeypatch.setattr(measure, "CudaTimer", Given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "ROUNDS", 3)


PASS = 2 * 2 * 3  # groups, sides, rounds


def test_the_gpu_command_twice_over_marks_what_moved(monkeypatch, tmp_path, capsys):
    """The second run takes twice as long."""
    without_a_gpu(monkeypatch, [1e-3] * PASS + [2e-3] * PASS)
    assert bench(["--device", "cuda", "--repeat", "2", "--out", str(tmp_path)]) == 0
    made = runs.load(tmp_path / "2026-01-02-h200.json")
    assert [r["spread"] for r in made["rows"]] == [1.0] * 4
    assert [r["median"] for r in made["rows"]] == [2e-3] * 4
    assert [r["median"] for r in made["earlier"][0]] == [1e-3] * 4
    assert set(made["clocks"]) == set(clocks.NAMES) and made["ceilings"]["last"]["copy"] == 1e9
    assert "**unstable**: ± 100%" in capsys.readouterr().out
    assert (tmp_path / "2026-01-02-h200-floor.png").exists()


def test_a_second_run_cut_short_loses_nothing(monkeypatch, tmp_path):
    without_a_gpu(monkeypatch, [1e-3] * PASS + [2e-3] * (PASS // 2))
    with pytest.raises(KeyboardInterrupt):
        bench(["--device", "cuda", "--repeat", "2", "--out", str(tmp_path)])
    path = tmp_path / "2026-01-02-h200.json"
    made = runs.load(path)
    assert [r["median"] for r in made["rows"]] == [2e-3] * 2 + [1e-3] * 2
    assert [r.get("spread") for r in made["rows"]] == [1.0] * 2 + [None] * 2
    assert "From token_logprobs 71×33 on: of the run before." in path.with_suffix(".md").read_text()


def test_klq_bench_without_a_checkout_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("klq.cli.__file__", str(tmp_path / "klq" / "cli.py"))
    assert klq(["bench"]) == 2
    assert "runs from a checkout" in capsys.readouterr().err


def test_clocks_are_sampled_beside_the_run():
    lines = "1980, 3201, 125.5, 41\\n1900, 3201, 300.0, 45\\n[N/A], 1, 2, 3\\n"
    with clocks.Clocks(("printf", lines)) as beside:
        beside.process.wait()
        sampled = beside.samples()
    assert sampled["sm_mhz"] == [1980.0, 1900.0] and sampled["celsius"] == [41.0, 45.0]
    with clocks.Clocks(("no-such-command",)) as beside:
        assert beside.samples() == {}


class Timer(sweeps.CpuTimer):
    def sample(self, kind, run):
        return 1e-3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sweeps_cover_every_axis(device):
    made = sweeps.sweeps(device)
    assert {s.axis for s in made} == {"N", "V", "D", "T", "active"}
    top = {"copy": 1e9, "matmul float32": 1e9}
    for sweep in made:
        small = sweep._replace(size=lambda at: TINY[jobs.SPECS[sweep.op].kind])  # noqa: B023
        point = sweeps.point(small, sweep.points[-1], "cpu", Timer(), top, 2)
        assert all(r["status"] == "ok" and r["floor"] > 0 for r in point["rows"]), point
    about = {"op": "a", "axis": "N", "label": "tokens N", "points": [point, point | {"at": 7}]}
    machine = {"cpu": "C", "threads": 1, "torch": "2", "date": "2026-01-02", "commit": "0" * 12}
    assert figures.sweeps_figure({"machine": machine, "sweeps": [about]}).axes


def test_the_whole_step_by_phases():
    small = step.step_model.Size(16, 1, 2, 64, 4, 5, 6, 2, torch.float32)
    made = step.ours(small, "cpu", "separate", repeats=1)
    assert all(made[p]["median_s"] > 0 for p in step.PHASES)
    sizes = small._asdict() | {"dtype": "torch.float32"}
    everything = {"machine": cpu.machine(), "settings": sizes, "loops": {"klq": made}}
    assert "| klq |" in step.table(everything) and "6, 4 epochs" in step.heading(everything)


# --- what is committed -------------------------------------------------------------------------


def test_sides_have_names_with_versions():
    machine = {"torch": "2.11.0+cu130", "peers": {"liger-kernel": "0.8.5", "torch": "2.11.0"}}
    assert names.called("liger, forward alone", machine) == "Liger 0.8.5, forward alone"
    assert names.called("eager float32", machine) == "eager PyTorch 2.11.0"
    assert names.called("cuda", machine) == "klq CUDA"
    assert names.family("cce_exact") == "cce"


def test_readme_is_what_the_results_say():
    text = tables.README.read_text()
    assert len(tables.BLOCK.findall(text)) == 2
    assert tables.readme(text) == text, "run python -m benchmarks.figures --readme"


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_figures_are_drawn_from_the_results(kind):
    from PIL import Image

    path = runs.latest(kind)
    drawn = sorted(path.parent.glob(f"{path.stem}-*.png"))
    assert drawn, "run python -m benchmarks.figures"
    for figure in drawn:
        assert Image.open(figure).info["Source"] == figures.source(runs.load(path)), figure


def test_files_are_named_by_date_and_machine():
    assert (
        runs.stem({"date": "2026-11-23T01:37", "gpu": "NVIDIA H100 80GB HBM3"}) == "2026-11-23-h100"
    )
    assert runs.stem({"date": "2026-11-23T01:37", "cpu": "AMD EPYC"}) == "2026-11-23-cpu"
    for kind in ("cuda", "cpu"):
        about = runs.load(runs.latest(kind))["machine"]
        assert {"date", "commit", "torch", "build"} <= set(about)
