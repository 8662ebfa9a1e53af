# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's arithmetic, on the CPU: a wrong result gets no number, floors and ratios are
what they say, and every workload's truth agrees with our C++ kernels and the peers in PyTorch."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind an installed klq

from benchmarks import cuda_resources, gpu, heads, measure, peers, scans, workloads
from benchmarks.measure import Absent, Bar, Check, Group, Row, Side


class FakeTimer:
    """Runs the call; the seconds come from a script."""

    def __init__(self, *seconds: float):
        self.seconds = seconds or (1e-3,)
        self.calls = 0

    def wait(self):
        pass

    def sample(self, kind, run):
        run()
        self.calls += 1
        return self.seconds[(self.calls - 1) % len(self.seconds)]

    def extra_bytes(self, run):
        run()
        return 1 << 30


def side(name="cuda", off=0.0, seconds_floor=1000, **how) -> Side:
    x = torch.ones(3)
    check = lambda got: {"x": Check(got, x.double(), 1e-6)}  # noqa: E731
    return Side(name, lambda: lambda: x + off, check, seconds_floor, **how)


@pytest.mark.parametrize("off", [1e-3, float("nan"), float("inf")])
def test_a_wrong_result_gets_no_number(off):
    rows = measure.measure(Group("op", "3", [side(off=off), side("peer")]), FakeTimer(), 4, 1e6)
    assert [r.status for r in rows] == ["wrong", "ok"]
    assert rows[0].samples == [] and "median" not in rows[0].as_dict()
    assert "**wrong**" in measure.table(rows)


def test_the_gate():
    truth = torch.zeros(2, dtype=torch.float64)
    assert measure.wrong({"x": Check(torch.zeros(2), truth, 0.0)}) is None
    assert "shape" in measure.wrong({"x": Check(torch.zeros(3), truth, 1.0)})
    assert "beyond" in measure.wrong({"x": Check(torch.tensor([0.0, 0.2]), truth, 0.1)})
    bounds = torch.tensor([0.0, 0.3])
    assert measure.wrong({"x": Check(torch.tensor([0.0, 0.2]), truth, bounds)}) is None
    assert measure.wrong({}) is not None
    lost = measure.wrong({"x": Check(torch.tensor([0.0, float("nan")]), truth, 1.0)})
    assert lost == "x: 1 of the 2 checked are not finite"


def test_reasons_instead_of_errors():
    def missing():
        raise Absent("nowhere: not installed")

    def broken():
        raise RuntimeError("first line\nsecond line")

    late = iter([None, None])  # the gate and the memory; then it breaks
    flaky = side("late")
    flaky.prepare = lambda: next(late)
    sides = [side("a"), side("b"), flaky, side("d")]
    sides[0].setup, sides[1].setup = missing, broken
    rows = measure.measure(Group("op", "3", sides), FakeTimer(), 3, 1e6)
    assert [r.status for r in rows] == ["absent", "failed", "failed", "ok"]
    assert rows[0].reason == "nowhere: not installed"
    assert rows[1].reason == "RuntimeError: first line"
    assert rows[2].samples == [] and len(rows[3].samples) == 3
    assert "nowhere: not installed" in measure.table(rows)


@pytest.fixture
def rotating(monkeypatch):
    """Sides in turn, from another one every round: what a fake timer can be told."""
    monkeypatch.setattr(measure, "order", lambda turn, n: [(turn + i) % n for i in range(n)])


def test_every_side_follows_every_other():
    rounds = [measure.order(turn, 5) for turn in range(25)]
    assert all(sorted(x) == list(range(5)) for x in rounds)
    pairs = {pair for x in rounds for pair in pairwise(x)}
    assert len(pairs) == 20 and len({x[0] for x in rounds}) == 5


def test_floors_medians_and_bars(rotating):
    bars = Bar(1.1, "floor"), Bar(0.5, "peer"), Bar(900, "us"), Bar(1.0, "nobody")
    group = Group("op", "3", [side(bars=bars, calls=2), side("peer")])
    (mine, peer) = measure.measure(group, FakeTimer(2e-3, 4e-3, 4e-3, 2e-3), 2, copy_rate=1e6)
    # two rounds, the first side rotating: mine 2, peer 4; peer 4, mine 2; each run is two calls
    assert mine.samples == [1e-3, 1e-3] and peer.samples == [4e-3, 4e-3]
    assert mine.floor == pytest.approx(1e-3)
    assert [b["met"] for b in mine.bars] == [True, True, False]  # nobody is no side here
    assert [round(b["is"], 3) for b in mine.bars] == [1.0, 0.25, 1000.0]
    found = mine.as_dict()
    assert found["x_floor"] == pytest.approx(1.0) and found["n"] == 2
    assert json.loads(json.dumps(found)) == found
    text = measure.table([mine, peer])
    assert "| op | 3 | cuda | 1.000 | 1.000 | 1.00 | 1.00 |" in text
    assert "**missed**: 1e+03 ≤ 900 µs" in text and "met: 0.25 ≤ 0.5 × peer" in text
    assert len({line.count("|") for line in text.strip().split("\n")}) == 1


def test_a_bar_against_a_side_without_a_number_is_not_judged():
    mine, peer = measure.Row("op", "3", "cuda", "queued"), measure.Row("op", "3", "peer", "queued")
    mine.samples, mine.floor, peer.status, peer.reason = [1.0], 1.0, "wrong", "NaN"
    measure.judge([mine, peer], [(Bar(1.0, "peer"),), ()])
    assert mine.bars == [{"limit": 1.0, "of": "peer", "met": None, "why": "wrong"}]
    assert "not judged: peer wrong" in measure.table([mine, peer])


def test_a_floor_may_be_a_side_and_memory_a_bar(rotating):
    sides = [side("products"), side(memory=1 << 29, bars=(Bar(1.5, "products"),))]
    sides += [side("lean", memory=1 << 31)]
    seconds = 2e-3, 3e-3, 4e-3
    group = Group("op", "3", sides, floor="products")
    rows = measure.measure(group, FakeTimer(*seconds), 1, copy_rate=1e6)
    assert [r.floor for r in rows] == [2e-3] * 3
    need = {"of": "bytes", "is": 1 << 30}
    assert rows[1].bars[1] == {"limit": 1 << 29, "met": False} | need
    assert rows[2].bars == [{"limit": 1 << 31, "met": True} | need]
    text = measure.table(rows)
    assert "met: 1.5 ≤ 1.5 × products; **missed**: 1.00 ≤ 0.50 GiB" in text
    sides[0].setup = lambda: 1 / 0
    rows = measure.measure(group, FakeTimer(*seconds), 1, copy_rate=1e6)
    assert rows[1].floor is None and "x_floor" not in rows[1].as_dict()
    assert "not judged: products failed" in measure.table(rows)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_gradient_of_a_head_is_checked(which):
    group = heads.linear_klq_loss(70, 16, 33, device="cpu", compiles=False)
    mine = next(s for s in group.sides if s.name == "cpp")
    got = [x.clone() for x in mine.setup()()]
    assert measure.wrong(mine.check(got)) is None
    got[which][0] += 1.0
    assert measure.wrong(mine.check(got)).startswith(("dhidden", "dweight", "dvalues")[which])


def test_a_peer_that_skips_gradients_is_not_held_to_the_tail_of_dweight():
    head = heads.Head(70, 16, 1000, "cpu")
    made = head.gradients(head.upstream.double())
    x, dw = head.hidden, torch.zeros_like(head.weight)
    dw[head.columns] = made[0][1].bfloat16()
    dw[head.columns[heads.ROWS :]] = 0
    dw[head.columns[: heads.ROWS]] = made[0][1][: heads.ROWS].bfloat16()
    dh = torch.zeros_like(x)
    dh[head.some] = made[0][0].bfloat16()
    assert measure.wrong(head.check_gradients(made, dh, dw, skips=True)) is None
    assert measure.wrong(head.check_gradients(made, dh, dw)).startswith("dweight")


def test_a_slow_side_stops_after_three_samples():
    rows = measure.measure(Group("op", "3", [side()], most=2.0), FakeTimer(5.0), 20, 1e6)
    assert len(rows[0].samples) == 3


def test_quantiles():
    x = [4.0, 1.0, 3.0, 2.0]
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        truth = float(torch.quantile(torch.tensor(x, dtype=torch.float64), q))
        assert measure.quantile(x, q) == pytest.approx(truth)


def test_a_scan_has_one_line_for_its_five_ways():
    kinds = ("call", "call hot", "graph", "graph hot", "host")
    rows = [
        Row("gae", "1×2", "cuda", k, samples=[1e-6 * i], floor=1e-7) for i, k in enumerate(kinds)
    ]
    lines = measure.table(rows).strip().split("\n")
    assert lines[2:] == ["| gae | 1×2 | cuda | 0.10 | 0.00 | 1.00 | 2.00 | 3.00 | 4.00 |  |"]


SMALL = {
    "token_logprobs": (70, 33),
    "token_stats": (70, 33),
    "klq_loss": (70, 33),
    "masked": (70, 33),
    "lambda_returns": (70, 9),
    "gae": (70, 9),
    "klq_targets": (3, 7, 33),
    "linear_klq_loss": (70, 16, 33),
    "linear_token_logprobs": (70, 16, 33),
    "linear_token_stats": (70, 16, 33),
}


@pytest.mark.parametrize("work", workloads.WORKLOADS, ids=lambda w: w.name)
def test_workloads_hold_our_kernels_and_eager_peers_to_the_truth(work):
    group = work.build(*SMALL[work.name], device="cpu", compiles=False)
    rows = measure.measure(group, FakeTimer(), 2, 1e9)
    for row in rows:
        expected = row.side == "F.cross_entropy" or "eager" in row.side or measure.is_ours(row.side)
        assert row.status == "ok" or not expected, row
    assert sum(r.status == "ok" for r in rows) >= 2
    assert all(r.bytes > 0 for r in rows)


def test_floor_bytes():
    (ours, *_) = workloads.token_logprobs(70, 33, device="cpu", compiles=False).sides
    assert ours.bytes == 70 * 33 * 2 + 70 * 12  # bf16 read; an id of 8 and a result of 4 bytes
    (ours, *_) = workloads.klq_loss(70, 33, device="cpu", compiles=False).sides
    assert ours.bytes == 2 * 70 * 33 * 2 + 70 * 24
    (ours, *_) = scans.scan("lambda_returns", 4, 8, device="cpu").sides
    assert ours.bytes == 25 * 32
    (ours, *_) = scans.packed_scan("gae", 8, 2, device="cpu").sides
    assert ours.bytes == 17 * 10 + 4 * 4


PLANTED = (
    "token_logprobs",
    "klq_loss",
    "lambda_returns",
    "klq_targets",
    "linear_klq_loss",
    "linear_token_logprobs",
    "linear_token_stats",
)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_refused(name):
    """One of the results that our own side gives, changed in one place."""
    work = next(w for w in workloads.WORKLOADS if w.name == name)
    sides = work.build(*SMALL[name], device="cpu", compiles=False).sides
    mine = next(s for s in sides if measure.is_ours(s.name))
    run = mine.setup()

    def spoiled():
        result = run()
        first = result if isinstance(result, torch.Tensor) else result[-1]
        with torch.no_grad():
            first.view(-1)[0] += 0.5  # row 0 is always among those checked
        return result

    mine.setup = lambda: spoiled
    (row,) = measure.measure(Group(name, "", [mine]), FakeTimer(), 1, 1e9)
    assert row.status == "wrong", row


def test_peers_say_why_they_are_absent():
    with pytest.raises(Absent, match="no_such_package: not installed"):
        peers.get("no_such_package.kernels", "run")
    with pytest.raises(Absent, match="has no nothing_like_it"):
        peers.get("torch", "nothing_like_it")
    assert peers.versions()["torch"] == torch.__version__


def test_the_heading_of_a_run_cut_short():
    about = {"gpu": "G", "torch": "T", "triton": "3", "date": "D", "commit": "C"}
    about["peers"] = {"liger-kernel": "1", "quack-kernels": "not installed"}
    top = {"first": {"copy": 4.26e12, "read": 4.4e12, "card": {"driver_version": "580"}}}
    text = gpu.heading(about, top)
    assert "driver 580" in text and "liger-kernel 1.\n" in text
    assert "4.26 TB/s (at its end: stopped before it was measured again;" in text
    top["last"] = {**top["first"], "copy": 4.2e12}
    assert "4.26 TB/s (at its end: 4.20;" in gpu.heading(about, top)


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ("Tiling<2, 192, 5, 2, true, false>, (anonymous namespace)::ScaledRows", "A across, `S"),
        ("Tiling<2, 192, 5, 2, true, true>, klq::cuda::IntoSum<true> ", "A and B across, `IntoS"),
        (
            "Tiling<2, 192, 5, 2, false, false>, klq::cuda::(anonymous namespace)::RowTiles<"
            "klq::cuda::bf16, true, (klq::cuda::(anonymous namespace)::Wanted)2> ",
            "`RowTiles<bf16, true, exponentials>`",
        ),
    ],
)
def test_names_of_compiled_kernels(arguments, shape):
    found = cuda_resources.family("x", f"void klq::cuda::gemm_kernel<klq::cuda::{arguments}>(int)")
    assert found.kernel == "gemm_kernel" and found.dynamic == 222208
    assert found.shape.startswith("128 x 192, 5 stages, clusters of 2, " + shape)


def test_shapes_of_kernels_that_nobody_knows_are_errors():
    with pytest.raises(ValueError, match="Tiling<2, 192>"):
        cuda_resources.family("x", "void klq::cuda::gemm_kernel<klq::cuda::Tiling<2, 192>>(int)")


def test_the_update_phase():
    """Both objectives of the loop's update are one number, and the report has both."""
    phase = pytest.importorskip("benchmarks.update_phase")
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
        "max_position_embeddings": 64,
    }
    trainer, batch = phase.trainer_of(shape, 4, 6, 5, 2, "cpu")
    calls = phase.recorded(trainer, batch)
    hidden, weight, bias, values, how = calls[0]
    (mine, _), (eager, _) = (
        f(hidden, weight, bias, values, **how) for f in phase.OBJECTIVES.values()
    )
    assert mine.item() == pytest.approx(eager.item(), rel=2e-2)
    found = phase.measure(trainer, batch, 1)
    assert found["passes"] == 2 and found["rows_a_pass"] == 10
    assert found["logits_bytes"] == 10 * 50 * 2
    text = phase.report(found)
    assert "| klq |" in text and "| eager |" in text
