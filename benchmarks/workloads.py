# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: each of `WORKLOADS` is a builder and the shapes it is called with.

A builder makes inputs at one shape, the truth in float64 (for logits on 64 of the rows), and a
`Group` of sides: our backends through the public functions, and the peers of `peers.PEERS`. Bars
are the targets of the project's plan. Fresh random numbers in every run, never zeros.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import klq_kernels as klq
from benchmarks import heads
from benchmarks.measure import Check, Group
from benchmarks.peers import logprobs_of, stats_of
from benchmarks.scans import TAU, packed_scan, scan, scan_checks
from benchmarks.sides import ours, size, theirs
from klq_kernels._dispatch import operator

# what a result may be off, relative to the largest: coarse, the tests are exact
SLACK = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Rows:
    """Logits with their actions, and what float64 and PyTorch's float32 make of 64 of the rows."""

    def __init__(self, tokens: int, vocabulary: int, dtype: torch.dtype, device: str):
        self.device, self.dtype = device, dtype
        self.logits = self.normal(tokens, vocabulary)
        self.actions = torch.randint(vocabulary, (tokens,), device=device)
        self.some = torch.randint(tokens, (64,), device=device)
        self.some[0], self.some[1] = 0, tokens - 1
        name = str(dtype).removeprefix("torch.")
        self.shape = f"{tokens}×{vocabulary}" + ("" if name == "bfloat16" else f" {name}")

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, 2)

    def checks(self, names, got, formula: Callable, *inputs: Tensor) -> dict[str, Check]:
        """Per-token results against the same formula in float64, within twice its error in float32
        and a slack for the type of the result."""
        rows = [x[self.some] for x in inputs]
        truth, plain = (
            formula(*(x.to(dtype) if x.is_floating_point() else x for x in rows))
            for dtype in (torch.float64, torch.float32)
        )
        out = {}
        for name, g, t, p in zip(names, got, truth, plain, strict=True):
            slack = SLACK[g.dtype] * max(1.0, float(t.abs().max()))
            out[name] = Check(g[self.some], t, 2 * float((p - t).abs().max()) + slack)
        return out


def token_logprobs(tokens, vocabulary, *, device="cuda", compiles=True) -> Group:
    r = Rows(tokens, vocabulary, torch.bfloat16, device)
    floor = size(r.logits) + tokens * 12
    bars = (1.10, "floor"), (1.0, "quack"), (1.0, "torch.compile")

    def check(got):
        formula = lambda x, a: (logprobs_of(x, a),)  # noqa: E731
        return r.checks(("logprobs",), (got,), formula, r.logits, r.actions)

    call = partial(klq.token_logprobs, r.logits, r.actions)
    sides = ours("token_logprobs", device, call, check, floor, bars=bars)
    args = r.logits, r.actions
    sides += theirs("token_logprobs", args, lambda p, y: check(p.sign * y), floor, compiles)
    return Group("token_logprobs", r.shape, sides)


def token_stats(tokens, vocabulary, *, device="cuda", compiles=True) -> Group:
    r = Rows(tokens, vocabulary, torch.bfloat16, device)
    ref = r.normal(tokens, vocabulary).mul_(0.25).add_(r.logits)
    floor = size(r.logits, ref) + tokens * 24
    args = r.logits, r.actions, ref

    def check(got):
        return r.checks(("logprobs", "entropy", "ref_logprobs", "kl"), got, stats_of, *args)

    call = partial(klq.token_stats, r.logits, r.actions, ref_logits=ref)
    sides = ours("token_stats", device, call, check, floor, bars=[(1.12, "floor")])
    sides += theirs("token_stats", args, lambda _, y: check(y), floor, compiles)
    return Group("token_stats, with reference", r.shape, sides)


class Produced(torch.autograd.Function):
    """Logits as a model hands them over: no leaf, so that a loss may consume them."""

    @staticmethod
    def forward(ctx, wanted, buffer):
        return buffer.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


class Loss:
    """Inputs of klq_loss, the call that consumes the logits, and the truth of its gradient."""

    def __init__(self, r: Rows):
        tokens = len(r.actions)
        self.rows, self.pristine = r, r.logits.clone()
        self.values, self.returns = torch.randn(2, tokens, device=r.device)
        self.ref = -torch.rand(tokens, device=r.device) - 1.0
        self.wanted = torch.ones((), device=r.device, requires_grad=True)

    def restore(self):
        self.rows.logits.copy_(self.pristine)

    def call(self, *, backend, mask=None) -> Tensor:
        """The whole step: loss, and the gradients of logits and values handed over."""
        x = Produced.apply(self.wanted, self.rows.logits)
        v = self.values.detach().requires_grad_()
        loss = klq.klq_loss(
            x,
            self.rows.actions,
            v,
            ref_logprobs=self.ref,
            returns=self.returns,
            tau=TAU,
            mask=mask,
            normalizer=1.0,
            inplace=True,
            backend=backend,
        ).loss
        return torch.autograd.grad(loss, (x, v))[0]

    def operator(self, *, backend) -> Tensor:
        """The forward alone: the gradients are there, for an upstream of 1."""
        r = self.rows
        args = r.actions, self.values, self.ref, self.returns, TAU, None, None, self.wanted.detach()
        klq_loss_ = operator(backend, "klq_loss_")
        klq_loss_(r.logits, *args, 1.0, 0.0)
        return r.logits

    def check(self, gradient: Tensor, sign: int = 1, mask: Tensor | None = None):
        """64 rows, entry by entry, relative to the entry at the precision it is written in."""
        r, some = self.rows, self.rows.some
        x, a = self.pristine[some].double(), r.actions[some]
        q = TAU * (logprobs_of(x, a) - self.ref[some]) + self.values[some]
        c = 2 * TAU * (q - self.returns[some]) if sign == 1 else -torch.ones_like(q)
        c_error = 2.0**-20 * c.abs() + (2 * TAU * TAU * 2.0**-16 if sign == 1 else 0.0)
        if mask is not None:
            c, c_error = (torch.where(mask[some], y, 0.0) for y in (c, c_error))
        p = torch.softmax(x, -1)
        onehot = torch.zeros_like(p).scatter_(-1, a[:, None], 1.0)
        truth = c[:, None] * (onehot - p)
        relative = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-13}[r.dtype]
        bound = relative * truth.abs() + c_error[:, None] * (onehot + p)
        return {"gradient": Check(gradient[some], truth, bound)}


def klq_loss(tokens, vocabulary, *, dtype=torch.bfloat16, device="cuda", compiles=True) -> Group:
    """Peers that only know cross entropy do the same work: softmax - onehot, times a number."""
    r = Rows(tokens, vocabulary, dtype, device)
    made = Loss(r)
    floor = 2 * size(r.logits) + tokens * 24
    again = {"prepare": made.restore}  # for all, so that they start from the same cache
    sides = []
    for call, name, suffix in (
        (made.call, "{}", ""),
        (made.operator, "{}, forward alone", ", forward alone"),
    ):
        bars = (1.12, "floor"), (1 / 1.7, f"liger{suffix}"), (1.0, "quack, forward alone")
        bars += () if suffix else ((1.0, "torch.compile"),)
        sides += ours("klq_loss", device, call, made.check, floor, name=name, bars=bars, **again)
    args = r.logits, r.actions, made.values, made.ref, made.returns, TAU
    sides += theirs("klq_loss", args, lambda p, y: made.check(y, p.sign), floor, compiles, **again)
    return Group("klq_loss, in place", r.shape, sides)


def masked(tokens, vocabulary, *, device="cuda", compiles=True) -> Group:
    """13 % of the rows active, beside the same calls without a mask."""
    r = Rows(tokens, vocabulary, torch.bfloat16, device)
    made, some = Loss(r), torch.rand(tokens, device=device) < 0.13
    everything = size(r.logits)
    part = everything * int(some.sum()) // tokens

    def check(got, mask=None):
        def formula(x, a):
            y = logprobs_of(x, a)
            return (y if mask is None else torch.where(mask[r.some], y, 0.0),)

        return r.checks(("logprobs",), (got,), formula, made.pristine, r.actions)

    logprobs = partial(klq.token_logprobs, r.logits, r.actions)
    sides = []
    for op, call, test, limit, written in (
        ("token_logprobs", logprobs, check, 0.2, 0),
        ("klq_loss", made.call, made.check, 0.63, everything),
    ):
        for mask, suffix, read in ((None, "", everything), (some, ", masked", part)):
            sides += ours(
                op,
                device,
                partial(call, mask=mask),
                partial(test, mask=mask),
                read + written + tokens * 12,
                name=f"{op} {{}}{suffix}",
                bars=[(limit, f"{op} {{}}")] if suffix else (),
                prepare=made.restore,
            )
    return Group("13 % of rows active", r.shape, sides)


def klq_targets(rows, time, vocabulary, *, device="cuda", compiles=True) -> Group:
    """One launch from logits to targets, beside the same two kernels launched apart."""
    r = Rows(rows * time, vocabulary, torch.bfloat16, device)
    ref = r.normal(rows * time, vocabulary).mul_(0.25).add_(r.logits)
    values, rewards = torch.randn(2, rows, time, device=device)
    x, y = (z.view(rows, time, vocabulary) for z in (r.logits, ref))
    actions = r.actions.view(rows, time)
    floor = size(x, y) + rows * time * 40
    names = ("logprobs", "ref_logprobs", "log_ratios")

    def formula(x, y, a):
        policy, reference = logprobs_of(x, a), logprobs_of(y, a)
        return policy, reference, policy - reference

    def check(got):
        ratios = {"log_ratios": got.log_ratios, "values": values, "rewards": rewards}
        flat = [getattr(got, n).flatten() for n in names]
        return r.checks(names, flat, formula, r.logits, ref, r.actions) | scan_checks(
            "lambda_returns", ratios, (got.q, got.advantages, got.returns)
        )

    def together(backend):
        return klq.klq_targets(x, actions, values, rewards, ref_logits=y, tau=TAU, backend=backend)

    def apart(backend):
        ratios = klq.token_log_ratios(x, y, actions, backend=backend)
        return ratios, klq.lambda_returns(ratios, values, rewards, tau=TAU, backend=backend)

    def check_apart(got):
        ratios = r.checks(
            names[2:], (got[0].flatten(),), lambda *z: formula(*z)[2:], r.logits, ref, r.actions
        )
        inputs = {"log_ratios": got[0], "values": values, "rewards": rewards}
        return ratios | scan_checks("lambda_returns", inputs, got[1])

    bars = (1.10, "floor"), (1.0, "{}, two launches")
    sides = ours("klq_targets", device, together, check, floor, bars=bars)
    sides += ours("token_log_ratios", device, apart, check_apart, floor, name="{}, two launches")
    return Group("klq_targets", f"{rows}×{time}×{vocabulary}", sides)


class Workload(NamedTuple):
    name: str  # what --only selects
    build: Callable[..., Group]
    shapes: tuple[tuple[int, ...], ...]


LOGITS = (8192, 128256), (16384, 50304), (8192, 151936), (32768, 32000), (2048, 262144)
SCANS = (64, 1024), (512, 2048), (4096, 8192), (8, 131072)

WORKLOADS = (
    Workload("token_logprobs", token_logprobs, LOGITS),
    Workload("token_stats", token_stats, LOGITS),
    Workload("klq_loss", klq_loss, LOGITS),
    Workload("klq_loss", partial(klq_loss, dtype=torch.float32), ((4096, 50304),)),
    Workload("masked", masked, ((8192, 128256),)),
    Workload("lambda_returns", partial(scan, "lambda_returns"), SCANS),
    Workload("lambda_returns", partial(packed_scan, "lambda_returns"), ((131072, 4096),)),
    Workload("gae", partial(scan, "gae"), SCANS),
    Workload("gae", partial(packed_scan, "gae"), ((131072, 4096),)),
    Workload("linear_klq_loss", heads.linear_klq_loss, heads.SHAPES),
    Workload("linear_token_logprobs", heads.linear_token_logprobs, heads.SHAPES),
    Workload("linear_token_logprobs", heads.linear_token_logprobs_forward, heads.SHAPES),
    Workload("linear_token_stats", heads.linear_token_stats, heads.SHAPES),
    Workload("klq_targets", klq_targets, ((64, 1024, 50304), (8, 2048, 128256), (1, 32768, 50304))),
)
