# SPDX-License-Identifier: Apache-2.0
"""The LM-head ops as workloads, beside the matrix products that nobody can leave out.

A group's floor is "three GEMMs" (logits, dH, dW; alone, each in one piece, into outputs that are
there) or, for a forward, "one GEMM", measured among the others. The rows are those of a policy on
its own samples: logits of standard deviation 2, and the action's lifted to a probability between
0.05 and 0.95.

The gate: log-probs and dH on 64 rows, dW on 64 rows of the vocabulary and on those of the 64
actions, against float64 of the same bfloat16 inputs. A result may be off by twice what eager
bfloat16 is off, or by a coarse share of the row's largest entry.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import klq_kernels as klq
from benchmarks import peers_heads
from benchmarks.measure import Check, Group, Side
from benchmarks.scans import TAU
from benchmarks.sides import ours, size, theirs

SHAPES = (8192, 4096, 128256), (16384, 2048, 50304), (16384, 2048, 151936)
MIB, GIB = 1 << 20, 1 << 30
ROWS = 64
SLACK = 2.0**-4  # of a row's largest entry, and nats of a log-prob; eager is at 0.01 to 0.03
SKIPPED = 0.25  # the same for a peer that leaves gradients out
MOST = 0.5  # seconds of samples of a side: ten of the slow ones
# by width: times the three GEMMs with 512 MiB of logits at a time, and with 1 GiB
LOSS_BARS = {4096: (1.13, 1.08), 2048: (1.10, None)}


class Head:
    """Inputs of an LM head, and what float64 and eager bfloat16 make of some rows and columns."""

    def __init__(self, tokens: int, width: int, vocabulary: int, device: str):
        self.device, self.shape = device, f"{tokens}×{width}×{vocabulary}"
        self.hidden = self.normal(1.0, tokens, width)
        self.weight = self.normal(2 / math.sqrt(width), vocabulary, width)
        self.actions = torch.randint(vocabulary, (tokens,), device=device)
        lift = torch.empty(tokens, 1, device=device).uniform_(-3, 3) + math.log(vocabulary) + 2
        taken = self.weight[self.actions].float()
        self.hidden += (taken * (lift / taken.square().sum(-1, keepdim=True))).bfloat16()
        self.upstream = torch.randn(tokens, device=device)
        self.some = torch.randint(tokens, (ROWS,), device=device)
        self.some[0], self.some[1] = 0, tokens - 1
        tail = torch.randint(vocabulary, (ROWS,), device=device)
        tail[0], tail[1] = 0, vocabulary - 1
        self.columns = torch.cat([self.actions[self.some], tail])
        self._measure()

    def normal(self, deviation: float, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, deviation)

    def _measure(self) -> None:
        """Truth: log-sum-exp of all rows from float32 logits, the rest in float64."""
        torch.set_float32_matmul_precision("highest")
        wide, tokens = self.weight.float(), len(self.actions)
        lse = torch.empty(tokens, dtype=torch.float64, device=self.device)
        taken, eager_lse = torch.empty_like(lse), lse.float()
        for part in (slice(i, i + 1024) for i in range(0, tokens, 1024)):
            h, w = (x.double() for x in (self.hidden[part], self.weight[self.actions[part]]))
            taken[part] = (h * w).sum(-1)
            lse[part] = (self.hidden[part].float() @ wide.T).logsumexp(-1)
            eager_lse[part] = F.linear(self.hidden[part], self.weight).float().logsumexp(-1)
        del wide
        self.lse, self.logprobs = lse, taken - lse  # [N]
        weight, few = self.weight.double(), self.hidden[self.some].double()
        logits = few @ weight.T
        lse = logits.logsumexp(-1, keepdim=True)
        self.entropy = (lse - ((logits - lse).exp() * logits).sum(-1, keepdim=True)).squeeze(-1)
        self.mean = (logits - lse).exp() @ weight  # [64, D] what dH subtracts
        del weight, logits
        at = self.hidden.double() @ self.weight[self.columns].double().T  # [N, 128]
        self.onehot = (self.actions[:, None] == self.columns).float()
        self.residual = self.onehot - (at - self.lse[:, None]).exp()
        # the same as eager bfloat16 has it
        logits = F.linear(self.hidden[self.some], self.weight)
        self.eager_logprobs = logits.float().log_softmax(-1)
        taken = self.eager_logprobs.gather(1, self.actions[self.some, None]).squeeze(-1)
        self.logprob_bound = bound(taken - self.logprobs[self.some])
        at = F.linear(self.hidden, self.weight[self.columns]).float()
        self.eager_residual = self.onehot - (at - eager_lse[:, None]).exp()

    def gradients(self, c: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
        """dH of `some` and dW of `columns` for the factors `c` [N] of the rows' gradient, and how
        far eager bfloat16 is off, relative to the largest entry of a row."""
        some, narrow = self.some, c.float()
        dh = c[some, None] * (self.weight[self.actions[some]].double() - self.mean)
        dw = (self.residual * c[:, None]).T @ self.hidden.double()
        g = -narrow[some, None] * self.eager_logprobs.exp()
        g.scatter_add_(1, self.actions[some, None], narrow[some, None])
        eager_dh = g.bfloat16() @ self.weight
        eager_dw = (self.eager_residual * narrow[:, None]).bfloat16().T @ self.hidden

        def off(x, truth):
            rows = (x.double() - truth).abs() / largest(truth).clamp(min=1e-30)
            return float(rows.max())  # a row whose factor is 0 is 0 in both

        return (dh, dw), (off(eager_dh, dh), off(eager_dw, dw))

    def check_logprobs(self, got: Tensor) -> Check:
        return Check(got[self.some], self.logprobs[self.some], self.logprob_bound)

    def check_entropy(self, got: Tensor) -> Check:
        eager = -(self.eager_logprobs.exp() * self.eager_logprobs).sum(-1)
        return Check(got[self.some], self.entropy, bound(eager - self.entropy))

    def check_gradients(self, made, dhidden: Tensor, dweight: Tensor, skips=False) -> dict:
        """`made` is what `gradients` gave."""
        (dh, dw), off = made
        columns = self.columns
        if skips:
            dw, columns = dw[:ROWS], columns[:ROWS]
        pairs = zip((dh, dw), off, strict=True)
        bounds = [largest(x) * max(2 * e, SKIPPED if skips else SLACK) for x, e in pairs]
        return {
            "dhidden": Check(dhidden[self.some], dh, bounds[0]),
            "dweight": Check(dweight[columns], dw, bounds[1]),
        }

    def least(self, backward: bool) -> int:
        """Bytes of the inputs, and of the gradients."""
        return size(self.hidden, self.weight) * (1 + backward) + len(self.actions) * 12

    def one_gemm(self) -> Side:
        def setup():
            out = self.hidden.new_empty(len(self.actions), self.weight.shape[0])
            return lambda: torch.mm(self.hidden, self.weight.T, out=out)

        def check(out):
            got = out[self.some[:, None], self.columns]
            few, rows = self.hidden[self.some].double(), self.weight[self.columns].double()
            truth = few @ rows.T
            return {"logits": Check(got, truth, 2.0**-7 * largest(truth))}

        return Side("one GEMM", setup, check, self.least(False))

    def three_gemms(self) -> Side:
        """The gradient that the last two read is the true one for `upstream`."""

        def setup():
            logits = self.hidden.new_empty(len(self.actions), self.weight.shape[0])
            g, dh, dw = (torch.empty_like(x) for x in (logits, self.hidden, self.weight))
            for part in (slice(i, i + 1024) for i in range(0, len(g), 1024)):
                c = self.upstream[part, None]
                x = F.linear(self.hidden[part], self.weight).float().softmax(-1).mul_(-c)
                g[part] = x.scatter_add_(1, self.actions[part, None], c)

            def run():
                torch.mm(self.hidden, self.weight.T, out=logits)
                torch.mm(g, self.weight, out=dh)
                torch.mm(g.T, self.hidden, out=dw)
                return dh, dw

            return run

        made = self.gradients(self.upstream.double())
        return Side(
            "three GEMMs", setup, lambda got: self.check_gradients(made, *got), self.least(True)
        )


def largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def bound(off: Tensor) -> float:
    return max(2 * float(off.abs().max()), SLACK)


def linear_klq_loss(tokens, width, vocabulary, *, device="cuda", compiles=True) -> Group:
    """Forward and backward; peers that know cross entropy alone do the same work."""
    head = Head(tokens, width, vocabulary, device)
    values, ref = torch.randn(2, tokens, device=device)
    # residuals of order one, none near zero: a gradient is judged relative to its row
    residual = torch.empty(tokens, device=device).uniform_(0.5, 1.5)
    residual *= torch.randint(2, (tokens,), device=device) * 2 - 1
    returns = (TAU * (head.logprobs - ref) + values - residual).float()
    residual = TAU * (head.logprobs - ref) + values - returns.double()
    mask = torch.zeros(tokens, dtype=torch.bool, device=device)
    mask[torch.randperm(tokens, device=device)[: tokens // 8]] = True
    active = int(mask.sum())

    def call(*, backend, **how):
        h, w, v = peers_heads.leaves(head.hidden, head.weight, values)
        loss = klq.linear_klq_loss(
            h,
            w,
            head.actions,
            v,
            ref_logprobs=ref,
            returns=returns,
            tau=TAU,
            normalizer=1.0,
            backend=backend,
            **how,
        ).loss
        return torch.autograd.grad(loss, (h, w, v))

    factors = {
        "all": residual,
        "some": torch.where(mask, residual, 0.0),
        "ce": torch.full_like(residual, -0.5 / TAU),
    }
    made = {name: head.gradients(2 * TAU * c) for name, c in factors.items()}

    def check(which, got):
        truth = 2 * factors[which][head.some]
        checks = {"dvalues": Check(got[2][head.some], truth, 2 * TAU * head.logprob_bound)}
        return checks | head.check_gradients(made[which], *got[:2])

    def check_peer(peer, got):
        return head.check_gradients(made["ce" if peer.sign == -1 else "all"], *got)

    usual, wide = LOSS_BARS.get(width, (None, None))
    # the chunk's logits, dW in float32 and 64 MiB beside what is handed back
    promised = 4 * head.weight.numel() + 64 * MIB + size(head.hidden, head.weight, values)
    side = partial(ours, "linear_klq_loss", device, floor=head.least(True))
    sides = [head.three_gemms()]
    sides += side(
        partial(call, chunk_bytes=512 * MIB),
        partial(check, "all"),
        bars=_against(usual),
        memory=promised + 512 * MIB,
    )
    sides += side(
        partial(call, chunk_bytes=GIB),
        partial(check, "all"),
        name="{}, chunk of 1 GiB",
        bars=_against(wide),
        memory=promised + GIB,
        twins=False,
    )
    sides += side(
        partial(call, chunk_bytes=512 * MIB, mask=mask, num_active=active),
        partial(check, "some"),
        name="{}, 12.5 % active",
        bars=[(0.16, "{}")],
        twins=False,
    )
    args = head.hidden, head.weight, head.actions, values, ref, returns, TAU
    sides += theirs("linear_klq_loss", args, check_peer, head.least(True), compiles)
    return Group("linear_klq_loss", head.shape, sides, "three GEMMs", MOST)


def linear_token_logprobs(tokens, width, vocabulary, *, device="cuda", compiles=True) -> Group:
    """Forward and backward with a random gradient a token."""
    op = "linear_token_logprobs"
    head = Head(tokens, width, vocabulary, device)
    gradients = head.gradients(head.upstream.double())

    def call(*, backend, keep_bytes):
        h, w = peers_heads.leaves(head.hidden, head.weight)
        y = klq.linear_token_logprobs(h, w, head.actions, keep_bytes=keep_bytes, backend=backend)
        return y.detach(), *torch.autograd.grad(y, (h, w), head.upstream)

    def check(got, sign=1, skips=False):
        logprobs = {"logprobs": head.check_logprobs(sign * got[0])}
        return logprobs | head.check_gradients(gradients, *got[1:], skips=skips)

    ahead = [(1.0, p.name) for p in peers_heads.HEADS[op]]
    everything = 2 * tokens * vocabulary + 64 * MIB
    sides = [head.three_gemms()]
    for keep, name, limit, twins in (
        (0, "{}", 1.40, True),
        (everything, "{}, all kept", 1.13, False),
    ):
        sides += ours(
            op,
            device,
            partial(call, keep_bytes=keep),
            check,
            head.least(True),
            name=name,
            bars=[(limit, "three GEMMs"), *ahead],
            twins=twins,
        )
    both = {1: head.upstream, -1: -head.upstream}
    args = head.hidden, head.weight, head.actions, both
    tested = lambda p, got: check(got, p.sign, p.skips)  # noqa: E731
    sides += theirs(op, args, tested, head.least(True), compiles)
    return Group(op, head.shape, sides, "three GEMMs", MOST)


def linear_token_logprobs_forward(
    tokens, width, vocabulary, *, device="cuda", compiles=True
) -> Group:
    op = "linear_token_logprobs, forward"
    head = Head(tokens, width, vocabulary, device)

    @torch.no_grad()
    def call(*, backend):
        return klq.linear_token_logprobs(head.hidden, head.weight, head.actions, backend=backend)

    check = lambda got: {"logprobs": head.check_logprobs(got)}  # noqa: E731
    bars = [(1.10, "one GEMM"), *((1.0, p.name) for p in peers_heads.HEADS[op])]
    sides = [head.one_gemm()]
    sides += ours("linear_token_logprobs", device, call, check, head.least(False), bars=bars)
    args = head.hidden, head.weight, head.actions
    sides += theirs(op, args, lambda p, y: check(p.sign * y), head.least(False), compiles)
    return Group(op, head.shape, sides, "one GEMM", MOST)


def linear_token_stats(tokens, width, vocabulary, *, device="cuda", compiles=True) -> Group:
    op = "linear_token_stats"
    head = Head(tokens, width, vocabulary, device)

    def call(*, backend):
        return klq.linear_token_stats(head.hidden, head.weight, head.actions, backend=backend)[:2]

    def check(got):
        logprobs, entropy = head.check_logprobs(got[0]), head.check_entropy(got[1])
        return {"logprobs": logprobs, "entropy": entropy}

    sides = [head.one_gemm()]
    sides += ours(op, device, call, check, head.least(False), bars=[(1.0, "eager"), (1.0, "trl")])
    args = head.hidden, head.weight, head.actions
    sides += theirs(op, args, lambda _, got: check(got), head.least(False), compiles)
    return Group(op, head.shape, sides, "one GEMM", MOST)


def _against(limit: float | None) -> list[tuple[float, str]]:
    return [] if limit is None else [(limit, "three GEMMs")]
