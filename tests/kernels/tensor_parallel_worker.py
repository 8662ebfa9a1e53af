# SPDX-License-Identifier: Apache-2.0
"""One rank of test_tensor_parallel: every op on its slice of the vocabulary against the whole."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from klq_kernels import (
    klq_loss,
    linear_klq_loss,
    linear_token_logprobs,
    linear_token_stats,
    token_logprobs,
    token_stats,
)

TOKENS, WIDTH = 12, 8


def problem(vocabulary: int, banned: slice | None, device: torch.device) -> dict:
    made = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=made).to(device)

    bias = draw(vocabulary) * 0.1
    if banned is not None:
        bias[banned] = -torch.inf
    allowed = bias.isfinite().nonzero().squeeze(-1)
    picked = torch.linspace(0, len(allowed) - 1, TOKENS).long()  # targets on every rank's slice
    mask = (torch.rand(TOKENS, generator=made) < 0.8).to(device)
    mask[0] = mask[-1] = True
    return {
        "hidden": draw(TOKENS, WIDTH),
        "weight": draw(vocabulary, WIDTH),
        "bias": bias,
        "actions": allowed[picked.to(device)],
        "values": draw(TOKENS),
        "mask": mask,
        "rest": {"ref_logprobs": draw(TOKENS) - 3, "returns": draw(TOKENS), "tau": 0.3},
    }


def run(p: dict, part: slice, backend: str, tp_group=None, wrap=lambda w: w) -> dict:
    """Results and gradients of every op; the head is cut to `part`."""
    how = {"mask": p["mask"], "temperature": 0.8, "logit_softcap": 9.0, "backend": backend}
    group = {} if tp_group is None else {"tp_group": tp_group}
    a, rest, out = p["actions"], p["rest"], {}
    logits = (p["hidden"] @ p["weight"].T + p["bias"])[:, part].detach()

    def leaves():
        given = p["hidden"], p["weight"][part], p["bias"][part], p["values"]
        return [x.clone().requires_grad_() for x in given]

    z = logits.clone().requires_grad_()
    lp = token_logprobs(z, a, **how, **group)
    out["token_logprobs"] = [lp, *torch.autograd.grad(lp.sin().sum(), z)]
    z, v = logits.clone().requires_grad_(), p["values"].clone().requires_grad_()
    made = klq_loss(z, a, v, **rest, **how, **group)
    out["klq_loss"] = [made.loss, *made.stats, *torch.autograd.grad(made.loss * 3, (z, v))]
    h, w, b, v = leaves()
    lp = linear_token_logprobs(h, wrap(w), a, bias=b, **how, **group)
    out["linear_token_logprobs"] = [lp, *torch.autograd.grad(lp.sin().sum(), (h, w, b))]
    h, w, b, v = leaves()
    made = linear_klq_loss(h, wrap(w), a, v, bias=b, **rest, **how, **group)
    grads = torch.autograd.grad(made.loss, (h, w, b, v))
    out["linear_klq_loss"] = [made.loss, *made.stats, *grads]
    h, w, b, v = leaves()
    out["linear_token_stats"] = list(linear_token_stats(h, wrap(w), a, bias=b, **how, **group)[:2])
    # chunks of two rows: every op meets the group once a chunk
    h, w, b, v = leaves()
    small = {**how, **group, "chunk_bytes": 4 * 27 * 4}
    lp = linear_token_logprobs(h, wrap(w), a, bias=b, **small, keep_bytes=3 * 27 * 4)
    out["by chunks"] = [lp, *torch.autograd.grad(lp.sin().sum(), (h, w, b))]
    h, w, b, v = leaves()
    made = linear_klq_loss(h, wrap(w), a, v, bias=b, **rest, **small)
    out["by chunks"] += [made.loss, *made.stats, *torch.autograd.grad(made.loss, (h, w, b, v))]
    out["by chunks"] += linear_token_stats(h, wrap(w), a, bias=b, **small)[:2]
    few = {**how, **group, "num_active": 1}
    lp = linear_token_logprobs(h, wrap(w), a, bias=b, **few)
    loss = linear_klq_loss(h, wrap(w), a, v, bias=b, **rest, **few).loss
    poisoned = [lp, loss, *torch.autograd.grad(lp.sum(), (h, w, b))]
    poisoned += torch.autograd.grad(loss, (h, w, b, v))
    assert all(x.isnan().all() for x in poisoned)
    return out


def compare(got: dict, want: dict, part: slice, vocabulary: int, what: str) -> None:
    """Slices of vocabulary-shaped results; everything else, dH included, is complete."""
    for op, tensors in want.items():
        for i, (x, y) in enumerate(zip(got[op], tensors, strict=True)):
            y = y[..., part] if y.dim() and y.shape[-1] == vocabulary else y
            y = y[part] if y.dim() == 2 and y.shape[0] == vocabulary else y
            torch.testing.assert_close(
                x, y, rtol=1e-5, atol=2e-6, msg=lambda m, op=op, i=i: f"{what}: {op}[{i}]: {m}"
            )


def compare_half(p: dict, part: slice, backend: str, tp_group) -> None:
    """A bfloat16 head, whose logits are rounded on every rank or, where the whole head's are not,
    on none: log-probs would show it in the third digit."""
    h, w = (p[k].bfloat16() for k in ("hidden", "weight"))
    how = {"mask": p["mask"], "backend": backend}
    whole, sharded = [], []
    for out, head, group in ((whole, w, {}), (sharded, w[part], {"tp_group": tp_group})):
        x, y = h.clone().requires_grad_(), head.clone().requires_grad_()
        lp = linear_token_logprobs(x, y, p["actions"], **how, **group)
        loss = linear_klq_loss(x, y, p["actions"], p["values"], **p["rest"], **how, **group).loss
        entropy = linear_token_stats(x, y, p["actions"], **how, **group).entropy
        grads = [*torch.autograd.grad(lp.sum(), (x, y)), *torch.autograd.grad(loss, (x, y))]
        out += [lp, loss, entropy, *(g[part] if g.shape == w.shape else g for g in grads)]
    for x, y in zip(sharded, whole, strict=True):
        narrow = x.dtype == torch.bfloat16
        most = {"rtol": 2**-6, "atol": 2**-8} if narrow else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(x, y, **most)


def main(rank: int, world: int, store: str, kind: str = "cpu") -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    how = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", **how)
    everything = dist.group.WORLD
    backends = ("cuda", "triton", "reference") if kind == "cuda" else ("cpp", "reference")
    for backend in backends:
        for name, vocabulary, cuts, banned in (
            ("equal", 38, (0, 19, 38), None),
            ("uneven", 38, (0, 27, 38), None),
            ("a shard all -inf", 38, (0, 19, 38), slice(19, 38)),
            ("first shard all -inf", 38, (0, 11, 38), slice(0, 11)),
        ):
            p = problem(vocabulary, banned, device)
            want = run(p, slice(0, vocabulary), backend)
            part = slice(cuts[rank], cuts[rank + 1])
            got = run(p, part, backend, (everything, cuts[rank]))
            compare(got, want, part, vocabulary, f"{name}, {backend}, rank {rank}")
            assert all(x.isfinite().all() for tensors in got.values() for x in tensors)
            if banned is None:
                compare_half(p, part, backend, (everything, cuts[rank]))
            if name == "equal":
                got = run(p, part, backend, everything)  # the group alone
                compare(got, want, part, vocabulary, f"group alone, {backend}")

    # TP = 1: one rank with the whole vocabulary
    p = problem(38, None, device)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    for backend in backends:
        want, got = run(p, slice(0, 38), backend), run(p, slice(0, 38), backend, (alone, 0))
        for op in want:
            assert all(torch.equal(x, y) for x, y in zip(got[op], want[op], strict=True)), op

    # a DTensor weight brings its group; other placements are refused with advice
    mesh = init_device_mesh(kind, (world,))
    whole = p["weight"]
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    a, bias = p["actions"], p["bias"].chunk(world)[rank]
    h = p["hidden"].clone().requires_grad_()
    lp = linear_token_logprobs(h, sharded, a, bias=bias)
    (dh,) = torch.autograd.grad(lp.sum(), h)
    k = p["hidden"].clone().requires_grad_()
    want = token_logprobs(k @ whole.T + p["bias"], a)
    torch.testing.assert_close(lp, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dh, torch.autograd.grad(want.sum(), k)[0], rtol=1e-5, atol=1e-5)
    stats = linear_token_stats(p["hidden"], sharded, a, bias=bias)
    plain = token_stats(p["hidden"] @ whole.T + p["bias"], a)
    torch.testing.assert_close(stats.entropy, plain.entropy, rtol=1e-5, atol=1e-5)
    for placement in (Replicate(), Shard(1)):
        other = distribute_tensor(whole, mesh, [placement])
        for op, rest in (
            (linear_token_logprobs, {}),
            (linear_token_stats, {}),
            (linear_klq_loss, {"values": p["values"], **p["rest"]}),
        ):
            try:
                op(p["hidden"], other, a, **rest)
            except ValueError as error:
                assert "full_tensor" in str(error) and op.__name__ in str(error)
            else:
                raise AssertionError(f"{op.__name__} accepted {placement}")
    try:
        if kind == "cpu":
            token_logprobs(whole @ whole.T, torch.full((38,), 99), tp_group=everything)
    except IndexError as error:
        assert "[0, 76)" in str(error)
    else:
        assert kind != "cpu", "an id outside the whole vocabulary was accepted"
    dist.destroy_process_group()
